#include "runtime/quick_checksum.h"

#include <atomic>
#include <cstring>

#include "common/parallel.h"

namespace neuron::runtime {
namespace {

uint64_t sum_of_words(const uint8_t* data, size_t size) {
  const size_t words = size / 8;
  uint64_t sum = 0;
  for (size_t i = 0; i < words; ++i) {
    uint64_t word = 0;
    std::memcpy(&word, data + i * 8, sizeof(word));
    sum += word;
  }
  uint64_t rest = 0;
  if (size % 8 != 0)
    std::memcpy(&rest, data + words * 8, size % 8);  // no bytes may have no address
  return sum + rest;
}

}  // namespace

int64_t quick_checksum(const at::Tensor& bytes) {
  const auto* data = static_cast<const uint8_t*>(bytes.const_data_ptr());
  std::atomic<uint64_t> total{0};
  // Parts begin at multiples of 64 bytes, so words are the same however many parts there are.
  in_parallel(static_cast<size_t>(bytes.numel()), [&](size_t begin, size_t end) {
    total.fetch_add(sum_of_words(data + begin, end - begin), std::memory_order_relaxed);
  });
  return static_cast<int64_t>(total.load());
}

}  // namespace neuron::runtime
