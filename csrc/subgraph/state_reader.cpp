#include "subgraph/state_reader.h"

namespace neuron::subgraph {
namespace {

template <typename Value>
std::optional<Value> find(const c10::Dict<std::string, Value>& bag, const std::string& field) {
  const auto found = bag.find(field);
  if (found == bag.end()) return std::nullopt;
  return found->value();
}

}  // namespace

int64_t StateReader::integer(const std::string& field, int64_t unset, int64_t least,
                             int64_t most) const {
  const int64_t value = find(std::get<1>(state_), field).value_or(unset);
  if (value < least || value > most) {
    reject(field, "is ", value, ", expected ", least, " to ", most);
  }
  return value;
}

std::string StateReader::text(const std::string& field) const {
  auto value = find(std::get<2>(state_), field);
  if (!value) reject(field, "is missing");
  return *value;
}

std::string StateReader::text_or_empty(const std::string& field) const {
  return find(std::get<2>(state_), field).value_or("");
}

std::vector<int64_t> StateReader::integers(const std::string& field) const {
  const auto value = find(std::get<3>(state_), field);
  return value ? value->vec() : std::vector<int64_t>{};
}

std::vector<std::string> StateReader::texts(const std::string& field) const {
  const auto value = find(std::get<4>(state_), field);
  return value ? value->vec() : std::vector<std::string>{};
}

at::Tensor StateReader::bytes(const std::string& field) const {
  const auto value = find(std::get<5>(state_), field);
  if (!value) return {};
  if (!value->defined()) reject(field, "is None, expected a tensor");
  if (!value->device().is_cpu() || value->layout() != at::kStrided ||
      value->scalar_type() != at::kByte || value->dim() != 1 || !value->is_contiguous()) {
    reject(field, "is a ", dtype_name(value->scalar_type()), " tensor of ", value->dim(),
           " dimensions on ", value->device(), ", expected a contiguous uint8 vector on cpu");
  }
  // A damaged file may claim a view that its storage does not hold.
  const auto held = static_cast<int64_t>(value->storage().nbytes());
  if (value->storage_offset() < 0 || value->storage_offset() + value->numel() > held) {
    reject(field, "is longer than its data");
  }
  return *value;
}

}  // namespace neuron::subgraph
