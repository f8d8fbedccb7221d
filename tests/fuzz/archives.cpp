#include "archives.h"

#include <torch/custom_class.h>
#include <torch/library.h>
#include <torch/script.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace neuron::fuzz {
namespace {

using subgraph::State;

// A stand-in for the real class and its op, under names of the same length. It gives any state when
// it is saved; the names in the archive are then put right.
constexpr char kStandInName[] = "neuron_exs";
constexpr char kRealName[] = "neuron_ext";

struct StandIn : torch::CustomClassHolder {
  explicit StandIn(State given) : state(std::move(given)) {}
  State state;
};

using StandInHandle = c10::intrusive_ptr<StandIn>;

TORCH_LIBRARY(neuron_exs, m) {
  m.class_<StandIn>("NeuronSubgraph")
      .def_pickle([](const StandInHandle& self) -> State { return self->state; },
                  [](State state) -> StandInHandle {
                    return c10::make_intrusive<StandIn>(std::move(state));
                  });
  m.def("forward",
        [](const std::vector<at::Tensor>& inputs, const StandInHandle&) { return inputs; });
}

template <typename Number>
Number read(const std::string& archive, size_t at) {
  Number number{};
  if (at > archive.size() || archive.size() - at < sizeof(number)) {
    throw std::runtime_error("an archive to begin with is broken");
  }
  std::memcpy(&number, archive.data() + at, sizeof(number));
  return number;
}

template <typename Number>
void write(std::string& out, size_t number) {
  const auto value = static_cast<Number>(number);
  std::array<char, sizeof(value)> bytes{};
  std::memcpy(bytes.data(), &value, sizeof(value));
  out.append(bytes.data(), bytes.size());
}

constexpr uint32_t kEndSignature = 0x06054b50;
constexpr uint32_t kEntrySignature = 0x02014b50;
constexpr uint32_t kRecordSignature = 0x04034b50;
constexpr size_t kEndSize = 22;

/// The fields that a record and its entry in the directory have in common, from "version needed".
void write_common(std::string& out, const Record& record, size_t extra) {
  write<uint16_t>(out, 20);
  write<uint16_t>(out, 0);  // flags
  write<uint16_t>(out, record.method);
  write<uint32_t>(out, 0);  // time and date
  write<uint32_t>(out, 0);  // CRC
  write<uint32_t>(out, record.data.size());
  write<uint32_t>(out, record.method == 0 ? record.data.size() : record.inflated);
  write<uint16_t>(out, record.name.size());
  write<uint16_t>(out, extra);
}

/// Opcodes of pickles, most of them those that PyTorch knows.
constexpr char kOpcodes[] = "\x80}](){uq.rhjXIJKMLFGNZStbeascR0120Q\x85\x86\x87\x88\x89\x8a";

char hard_byte(Dice& dice) {
  return dice.one_in(3) ? kOpcodes[dice.below(sizeof(kOpcodes) - 1)]
                        : static_cast<char>(dice.byte());
}

std::string mutated_bytes(std::string bytes, size_t begin, size_t end, Dice& dice) {
  end = std::min(end, bytes.size());
  if (begin >= end) return bytes;
  const auto spot = [&] { return begin + dice.below(end - begin); };
  switch (dice.below(8)) {
    case 0:
      bytes.erase(spot(), 1 + dice.below(16));
      break;
    case 1: {
      const size_t at = spot();
      for (size_t i = 1 + dice.below(8); i > 0; --i) bytes.insert(at, 1, hard_byte(dice));
      break;
    }
    case 2:
      bytes.insert(spot(), bytes.substr(spot(), 1 + dice.below(64)));
      break;
    case 3: {  // a number of four or eight bytes
      const int64_t number = dice.number();
      const size_t at = spot();
      const size_t size = std::min<size_t>(dice.one_in(2) ? 4 : 8, bytes.size() - at);
      std::memcpy(bytes.data() + at, &number, size);
      break;
    }
    case 4:
      for (size_t i = 1 + dice.below(8); i > 0; --i) bytes[spot()] ^= 1 << dice.below(8);
      break;
    default:
      bytes[spot()] = hard_byte(dice);
  }
  return bytes;
}

void mutate_records(std::vector<Record>& records, const std::vector<Record>& others, Dice& dice) {
  if (records.empty()) return;
  const size_t at = dice.below(records.size());
  const auto there = records.begin() + static_cast<std::ptrdiff_t>(at);
  Record& record = *there;
  switch (dice.below(10)) {
    case 9:
      record.method = dice.one_in(2) ? 8 : static_cast<uint16_t>(dice.below(100));
      record.inflated = static_cast<size_t>(dice.number());
      break;
    case 0:
      records.erase(there);
      break;
    case 1: {
      const Record again = record;
      records.push_back(again);
      break;
    }
    case 2:
      std::swap(record.data, records[dice.below(records.size())].data);
      break;
    case 3:
      record.name = mutated_bytes(record.name, 0, record.name.size(), dice);
      break;
    case 4:
      record.data.resize(dice.below(record.data.size() + 1));
      break;
    case 5:
      record.data.append(1 + dice.below(100), static_cast<char>(dice.byte()));
      break;
    case 6:
      if (!others.empty()) record.data = dice.of(others).data;
      break;
    case 7:
      if (!others.empty()) records.push_back(dice.of(others));
      break;
    default:
      record.data = mutated_bytes(record.data, 0, record.data.size(), dice);
  }
}

}  // namespace

std::vector<Record> records_of(const std::string& archive) {
  if (archive.size() < kEndSize) throw std::runtime_error("an archive to begin with is broken");
  const size_t end = archive.size() - kEndSize;  // PyTorch writes no comment
  if (read<uint32_t>(archive, end) != kEndSignature) {
    throw std::runtime_error("an archive to begin with does not end as archives do");
  }
  const auto count = read<uint16_t>(archive, end + 10);
  size_t entry = read<uint32_t>(archive, end + 16);
  std::vector<Record> records;
  for (size_t i = 0; i < count; ++i) {
    if (read<uint32_t>(archive, entry) != kEntrySignature) {
      throw std::runtime_error("an archive to begin with has a broken directory");
    }
    const size_t size = read<uint32_t>(archive, entry + 20);
    const size_t name = read<uint16_t>(archive, entry + 28);
    const size_t header = read<uint32_t>(archive, entry + 42);
    const size_t data =
        header + 30 + read<uint16_t>(archive, header + 26) + read<uint16_t>(archive, header + 28);
    records.push_back({archive.substr(entry + 46, name), archive.substr(data, size), data,
                       read<uint16_t>(archive, entry + 10), read<uint32_t>(archive, entry + 24)});
    entry += 46 + name + read<uint16_t>(archive, entry + 30) + read<uint16_t>(archive, entry + 32);
  }
  return records;
}

std::string archive_of(const std::vector<Record>& records) {
  std::string archive;
  std::string directory;
  for (const Record& record : records) {
    const size_t header = archive.size();
    write<uint32_t>(archive, kRecordSignature);
    write_common(archive, record, 0);
    archive += record.name + record.data;
    write<uint32_t>(directory, kEntrySignature);
    write<uint16_t>(directory, 0);  // made by
    write_common(directory, record, 0);
    write<uint16_t>(directory, 0);  // no comment
    write<uint16_t>(directory, 0);  // first disk
    write<uint16_t>(directory, 0);
    write<uint32_t>(directory, 0);
    write<uint32_t>(directory, header);
    directory += record.name;
  }
  const size_t start = archive.size();
  archive += directory;
  write<uint32_t>(archive, kEndSignature);
  write<uint32_t>(archive, 0);  // disks
  write<uint16_t>(archive, records.size());
  write<uint16_t>(archive, records.size());
  write<uint32_t>(archive, directory.size());
  write<uint32_t>(archive, start);
  write<uint16_t>(archive, 0);
  return archive;
}

std::string archive_with(const State& state) {
  torch::jit::Module module("Traced");
  module.register_attribute("subgraph", c10::getCustomClassType<StandInHandle>(),
                            c10::IValue(c10::make_intrusive<StandIn>(state)));
  const auto graph = std::make_shared<torch::jit::Graph>();
  torch::jit::Value* self = graph->addInput("self")->setType(module._ivalue()->type());
  torch::jit::Value* x = graph->addInput("x");
  torch::jit::Value* subgraph = graph->insertGetAttr(self, "subgraph");
  torch::jit::Value* inputs =
      graph->insertNode(graph->createList(c10::TensorType::get(), {x}))->output();
  const auto op = c10::Symbol::fromQualString(std::string(kStandInName) + "::forward");
  torch::jit::Value* outputs = graph->insert(op, {inputs, subgraph});
  graph->registerOutput(graph->insert(c10::aten::__getitem__, {outputs, 0}));
  const c10::QualifiedName name(*module.type()->name(), "forward");
  module.type()->addMethod(module._ivalue()->compilation_unit()->create_function(name, graph));
  std::ostringstream out;
  module.save(out);
  std::string archive = out.str();
  for (size_t at = archive.find(kStandInName); at != std::string::npos;
       at = archive.find(kStandInName, at)) {
    archive.replace(at, sizeof(kRealName) - 1, kRealName);
  }
  return archive;
}

std::string mutated(const std::string& archive, const std::string& other, Dice& dice) {
  std::vector<Record> records = records_of(archive);
  const auto pickle = std::find_if(records.begin(), records.end(), [](const Record& record) {
    return record.name.ends_with("/data.pkl");
  });
  switch (dice.below(8)) {
    case 0:  // anywhere, the structure of the archive included
      return mutated_bytes(archive, 0, archive.size(), dice);
    case 1:
      return archive.substr(0, dice.below(archive.size()));
    case 2: {  // in place: what stands behind stays where the directory says it is
      const Record& record = dice.of(records);
      return mutated_bytes(archive, record.offset, record.offset + record.data.size(), dice);
    }
    case 3:
    case 4:
      for (size_t changes = 1 + dice.below(2); changes > 0; --changes) {
        mutate_records(records, records_of(other), dice);
      }
      return archive_of(records);
    default:  // the pickled state is what most depends on
      if (pickle == records.end()) return archive;
      for (size_t changes = 1 + dice.below(2); changes > 0; --changes) {
        pickle->data = mutated_bytes(pickle->data, 0, pickle->data.size(), dice);
      }
      return archive_of(records);
  }
}

}  // namespace neuron::fuzz
