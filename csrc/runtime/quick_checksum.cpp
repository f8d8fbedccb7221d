#include "runtime/quick_checksum.h"

#include <cstring>

namespace neuron::runtime {

int64_t quick_checksum(const at::Tensor& bytes) {
  const auto* data = static_cast<const uint8_t*>(bytes.const_data_ptr());
  const int64_t words = bytes.numel() / 8;
  uint64_t sum = 0;
  for (int64_t i = 0; i < words; ++i) {
    uint64_t word = 0;
    std::memcpy(&word, data + i * 8, sizeof(word));
    sum += word;
  }
  uint64_t rest = 0;
  std::memcpy(&rest, data + words * 8, static_cast<size_t>(bytes.numel() - words * 8));
  return static_cast<int64_t>(sum + rest);
}

}  // namespace neuron::runtime
