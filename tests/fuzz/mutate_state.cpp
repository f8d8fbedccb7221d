#include <ATen/ATen.h>

#include <limits>
#include <utility>

#include "states.h"
#include "subgraph/state_reader.h"

namespace neuron::fuzz {
namespace {

using subgraph::State;

const std::vector<std::string>& hard_texts() {
  static const auto& texts = *new std::vector<std::string>{
      "",
      "nan",
      "inf",
      "-1",
      "torchscript",
      "inductor",
      "neff",
      "zip",
      "float32",
      "half",
      "float8_e4m3fn",
      "quint4x2",
      "bits16",
      "uint7",
      "undefined",
      "float31",
      "strided",
      "mkldnn",
      "sparse",
      "2",
      "2.",
      "2.13",
      "..",
      "pdp11",
      std::string(64, '0'),
      std::string(64, 'g'),
      std::string(100000, 'x'),
      std::string("a\0b", 3),
      "\xff\xfe\x80",
      "%s%n%s",
      "../../etc",
  };
  return texts;
}

at::Tensor bytes_of(Dice& dice, size_t size) {
  at::Tensor bytes = at::empty({static_cast<int64_t>(size)}, at::kByte);
  auto* data = static_cast<uint8_t*>(bytes.mutable_data_ptr());
  for (size_t i = 0; i < size; ++i) data[i] = dice.byte();
  return bytes;
}

/// A tensor that says more of itself than its storage holds, as a file may.
at::Tensor lying(const at::Tensor& honest, Dice& dice) {
  at::Tensor tensor = at::empty({0}, honest.options());
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(honest.storage());
  try {
    if (dice.one_in(2)) impl->set_storage_offset(dice.number());
    const int64_t stride = dice.one_in(2) ? 1 : dice.number();
    impl->set_sizes_and_strides(
        std::vector<int64_t>{dice.one_in(2) ? honest.numel() : dice.number()}, {stride});
  } catch (const c10::Error&) {  // some lies are refused at once
  }
  return tensor;
}

at::Tensor hard_tensor(const at::Tensor& now, Dice& dice) {
  // What lies already is not looked into: that would be a fault of this program.
  const bool bytes = now.defined() && subgraph::lies_in_its_storage(now) &&
                     now.scalar_type() == at::kByte && now.dim() == 1;
  switch (dice.below(bytes ? 16 : 9)) {
    case 0:
      return {};
    case 1:
      return at::empty({0}, at::kByte);
    case 2:
      return at::full({3}, std::numeric_limits<double>::quiet_NaN());
    case 3:
      return at::zeros({2, 3}, at::kByte);
    case 4:
      return at::zeros({}, at::kByte);
    case 5:
      return at::zeros({8}, at::kByte).slice(0, 0, 8, 2);
    case 6:
      return at::zeros({1}, at::kByte).expand({int64_t{1} << 40});
    case 7:
      return dice.one_in(2) ? at::zeros({4}, at::TensorOptions(at::kByte).device(at::kMeta))
                            : at::zeros({2, 2}).to_sparse();
    case 8:
      return bytes_of(dice, dice.below(200));
    case 9:
    case 10:
      return lying(now, dice);
    case 11:
      return at::cat({now, bytes_of(dice, 1 + dice.below(20))});
    case 12:
      return now.slice(0, static_cast<int64_t>(dice.below(static_cast<size_t>(now.numel()))));
    default: {
      if (now.numel() == 0) return {};
      at::Tensor changed = now.clone();
      auto* data = static_cast<uint8_t*>(changed.mutable_data_ptr());
      const size_t size = static_cast<size_t>(changed.numel());
      for (size_t i = 1 + dice.below(4); i > 0; --i) data[dice.below(size)] ^= 1 << dice.below(8);
      return changed;
    }
  }
}

void change(int64_t& value, Dice& dice) {
  // Unsigned, so that the greatest number has a neighbour, too.
  const auto near = static_cast<uint64_t>(value) + dice.below(3) - 1;
  value = dice.one_in(3) ? static_cast<int64_t>(near) : dice.number();
}

void change(std::string& value, Dice& dice) {
  if (value.empty() || dice.one_in(2)) {
    value = dice.of(hard_texts());
  } else if (dice.one_in(2)) {
    value[dice.below(value.size())] = static_cast<char>(dice.byte());
  } else {
    value.resize(dice.below(2 * value.size()), 'z');
  }
}

void change(at::Tensor& value, Dice& dice) {
  value = hard_tensor(value, dice);
}

template <typename Element>
void change(c10::List<Element>& value, Dice& dice) {
  std::vector<Element> list = value.vec();
  const size_t at = dice.below(list.size());
  const auto there = list.begin() + static_cast<std::ptrdiff_t>(at);
  switch (dice.below(7)) {
    case 0:
      list.clear();
      break;
    case 1:
      if (!list.empty()) list.erase(there);
      break;
    case 2: {
      Element added{};
      change(added, dice);
      list.insert(there, added);
      break;
    }
    case 3:
      if (!list.empty()) std::swap(list[at], list[dice.below(list.size())]);
      break;
    case 4:
      if (dice.one_in(20)) {
        list.resize(20000);
      } else {
        list.insert(list.end(), list.begin(), there);
      }
      break;
    default:
      if (!list.empty()) change(list[at], dice);
  }
  value = c10::List<Element>(list);
}

/// Names of fields that not every state has.
const std::vector<std::string>& rare_names() {
  static const auto& names = *new std::vector<std::string>{"later",        "",
                                                           "weights",      "graph",
                                                           "code",         "state_initial",
                                                           "tied_names",   "constants_opaque",
                                                           "state_inputs", "held_inputs",
                                                           "sha256_state", "checksum_code"};
  return names;
}

template <typename Value>
void mutate_bag(c10::Dict<std::string, Value>& bag, Dice& dice) {
  std::vector<std::string> names;
  for (const auto& entry : bag) names.push_back(entry.key());
  std::string name = names.empty() || dice.one_in(8) ? dice.of(rare_names()) : dice.of(names);
  Value value{};
  if (const auto found = bag.find(name); found != bag.end()) value = found->value();
  switch (dice.below(6)) {
    case 0:
      static_cast<void>(bag.erase(name));
      return;
    case 1:  // under another name
      if (dice.one_in(2)) static_cast<void>(bag.erase(name));
      change(name, dice);
      break;
    case 2:  // that of another field
      if (!names.empty()) value = bag.at(dice.of(names));
      break;
    default:
      change(value, dice);
  }
  bag.insert_or_assign(name, value);
}

}  // namespace

void mutate(State& state, Dice& dice) {
  for (size_t changes = 1 + dice.below(3); changes > 0; --changes) {
    switch (dice.below(16)) {
      case 0:
        if (dice.one_in(3)) std::get<0>(state) = dice.number();
        break;
      case 1:
      case 2:
        mutate_bag(std::get<1>(state), dice);
        break;
      case 3:
      case 4:
        mutate_bag(std::get<2>(state), dice);
        break;
      case 5:
      case 6:
      case 7:
      case 8:
        mutate_bag(std::get<4>(state), dice);
        break;
      case 9:
      case 10:
      case 11:
        mutate_bag(std::get<5>(state), dice);
        break;
      default:
        mutate_bag(std::get<3>(state), dice);
    }
  }
}

}  // namespace neuron::fuzz
