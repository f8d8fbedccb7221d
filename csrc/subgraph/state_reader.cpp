#include "subgraph/state_reader.h"

#include <c10/core/CPUAllocator.h>
#include <malloc.h>

#include <algorithm>

namespace neuron::subgraph {
namespace {

/// Whether malloc knows the sizes of what PyTorch's allocator gives; a PyTorch could be built upon
/// another one.
bool malloc_tells_sizes() {
  static const bool tells = [] {
    constexpr size_t kSize = 1000;
    constexpr size_t kSlack = 256;
    const c10::DataPtr data = c10::GetDefaultCPUAllocator()->allocate(kSize);
    const size_t size = ::malloc_usable_size(data.get());
    return size >= kSize && size <= kSize + kSlack;
  }();
  return tells;
}

/// The bytes that a storage has. PyTorch's reader takes the length of a storage from the pickle,
/// and its bytes from a record of the archive that may be shorter; that one's length malloc knows.
size_t bytes_behind(const c10::Storage& storage) {
  const c10::DataPtr& data = storage.data_ptr();
  if (data.get() == nullptr) return 0;
  const bool own_block = data.get_deleter() == c10::GetDefaultCPUAllocator()->raw_deleter() &&
                         data.get() == data.get_context();
  if (!own_block || !malloc_tells_sizes()) return storage.nbytes();
  return std::min(storage.nbytes(), ::malloc_usable_size(data.get()));
}

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
  if (!lies_in_its_storage(*value)) reject(field, "is longer than its data");
  return *value;
}

bool lies_in_its_storage(const at::Tensor& tensor) {
  if (!tensor.is_cpu() || tensor.layout() != at::kStrided || !tensor.is_contiguous()) return false;
  // Of a huge size and offset, sums and products are not what they seem.
  const auto held = static_cast<int64_t>(bytes_behind(tensor.storage()));
  const auto item = static_cast<int64_t>(tensor.itemsize());
  const int64_t offset = tensor.storage_offset();
  if (item <= 0 || offset < 0 || offset > held / item) return false;
  int64_t elements = 1;
  for (const int64_t size : tensor.sizes()) {
    if (size < 0 || (size > 0 && elements > held / item / size)) return false;
    elements *= size;
  }
  return elements == tensor.numel() && elements <= held / item - offset;
}

}  // namespace neuron::subgraph
