// Sharing out work over memory; also under ThreadSanitizer, so nothing here is atomic.
#include "common/parallel.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <thread>
#include <vector>

namespace neuron {
namespace {

constexpr size_t kPage = 4096;

/// How often each page of `size` bytes begins in a part. There is no memory of that size.
std::vector<int> visits(size_t size) {
  std::vector<int> counts((size + kPage - 1) / kPage);
  in_parallel(size, [&](size_t begin, size_t end) {
    EXPECT_LE(begin, end);
    EXPECT_LE(end, size);
    for (size_t at = (begin + kPage - 1) / kPage * kPage; at < end; at += kPage)
      ++counts[at / kPage];
  });
  return counts;
}

TEST(InParallel, HasEveryPlaceInOnePart) {
  constexpr size_t kMega = size_t{1} << 20;
  for (const size_t size : {size_t{0}, size_t{1}, 16 * kMega, 32 * kMega - 1, 32 * kMega,
                            48 * kMega + 1, 64 * kMega + 63, 1000 * kMega + 7}) {
    for (const int count : visits(size)) ASSERT_EQ(count, 1) << size;
  }
}

TEST(InParallel, IsDoneWhenItReturnsWhoeverElseCallsIt) {
  constexpr size_t kSize = size_t{200} << 20;
  std::vector<std::vector<int>> counts(4);
  std::vector<std::thread> callers;
  for (auto& mine : counts) callers.emplace_back([&mine] { mine = visits(kSize); });
  for (auto& caller : callers) caller.join();
  for (const auto& mine : counts) EXPECT_EQ(mine, std::vector<int>(kSize / kPage, 1));
}

}  // namespace
}  // namespace neuron
