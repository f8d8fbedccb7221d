#include "runtime/content.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <atomic>
#include <latch>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "common/sha256.h"
#include "runtime/quick_checksum.h"

namespace neuron::runtime {
namespace {

using Check = Content::Check;

/// `size` bytes of its own that count up from `first`.
at::Tensor bytes_from(int64_t first, int64_t size = 1000) {
  return at::arange(first, first + size).to(at::kByte);
}

std::string digest_of(const at::Tensor& bytes) {
  return sha256_hex(bytes.const_data_ptr(), static_cast<size_t>(bytes.numel()));
}

Content content_of(const at::Tensor& bytes) {
  return Content(bytes, digest_of(bytes), quick_checksum(bytes));
}

const void* address(const Content& content) {
  return content.bytes().const_data_ptr();
}

TEST(Content, EqualBytesAreKeptOnce) {
  Content one = content_of(bytes_from(1));
  Content other = content_of(bytes_from(1));
  ASSERT_NE(address(one), address(other));
  EXPECT_TRUE(one.verify(Check::kQuick, false));
  EXPECT_TRUE(other.verify(Check::kQuick, false));
  EXPECT_EQ(address(one), address(other));
}

TEST(Content, TheBytesGivenUpAreFreedAndTheSharedOnesGoWithTheirLastUser) {
  std::vector<uint8_t> memory(100, 7);
  int freed = 0;
  const auto borrow = [&] {
    return at::from_blob(memory.data(), {100}, [&](void*) { ++freed; }, at::kByte);
  };
  const std::string digest = digest_of(borrow());
  ASSERT_EQ(freed, 1);
  auto one = std::make_unique<Content>(borrow(), digest, std::nullopt);
  auto other = std::make_unique<Content>(borrow(), digest, std::nullopt);
  EXPECT_TRUE(one->verify(Check::kFull, false));
  EXPECT_EQ(freed, 1);
  EXPECT_TRUE(other->verify(Check::kFull, false));
  EXPECT_EQ(freed, 2);
  one.reset();
  EXPECT_EQ(freed, 2);
  EXPECT_EQ(other->bytes().numel(), 100);
  other.reset();
  EXPECT_EQ(freed, 3);
}

TEST(Content, AClaimedDigestIsNotBelieved) {
  const at::Tensor good = bytes_from(2);
  const at::Tensor bad = bytes_from(3);
  Content first(bad, digest_of(good), quick_checksum(good));  // stands in the pool by now
  Content second(good.clone(), digest_of(good), quick_checksum(good));
  EXPECT_TRUE(second.verify(Check::kQuick, false));
  EXPECT_TRUE(second.verify(Check::kFull, false));
  EXPECT_TRUE(at::equal(second.bytes(), good));
  EXPECT_FALSE(first.verify(Check::kQuick, false));
  EXPECT_FALSE(first.verify(Check::kFull, false));
  EXPECT_TRUE(at::equal(first.bytes(), bad));
}

TEST(Content, AQuickCheckIsNoFullOne) {
  const at::Tensor good = bytes_from(4);
  at::Tensor swapped = good.clone();  // the same sum, another order
  swapped.slice(0, 0, 8).copy_(good.slice(0, 8, 16));
  swapped.slice(0, 8, 16).copy_(good.slice(0, 0, 8));
  Content content(swapped, digest_of(good), quick_checksum(good));
  EXPECT_TRUE(content.verify(Check::kQuick, false));
  EXPECT_FALSE(content.verify(Check::kFull, false));
  Content copy(swapped.clone(), digest_of(good), quick_checksum(good));
  EXPECT_FALSE(copy.verify(Check::kFull, false));
}

TEST(Content, WhatWasCheckedIsComputedAgainOnlyWhenAsked) {
  const at::Tensor bytes = bytes_from(5);
  Content content = content_of(bytes);
  EXPECT_TRUE(content.verify(Check::kFull, false));
  bytes[0] = 99;  // behind its back
  EXPECT_TRUE(content.verify(Check::kFull, false));
  EXPECT_FALSE(content.verify(Check::kFull, true));
  EXPECT_FALSE(content.verify(Check::kQuick, true));
}

TEST(Content, WithoutAChecksumTheDigestDecides) {
  const at::Tensor bytes = bytes_from(6);
  EXPECT_TRUE(Content(bytes, digest_of(bytes), std::nullopt).verify(Check::kQuick, false));
  EXPECT_FALSE(Content(bytes, digest_of(bytes_from(7)), std::nullopt).verify(Check::kQuick, false));
}

TEST(Content, NoBytesAtAllAreFine) {
  Content one = content_of(at::zeros({0}, at::kByte));
  Content other = content_of(at::zeros({0}, at::kByte));
  EXPECT_TRUE(one.verify(Check::kFull, false));
  EXPECT_TRUE(other.verify(Check::kFull, false));
}

TEST(Content, LargeBytesAreReadByPartsAndNoneIsMissed) {
  constexpr int64_t kSize = (int64_t{70} << 20) + 5;  // several parts, the last of an odd size
  at::Tensor bytes = at::ones({kSize}, at::kByte);
  const auto word_of_ones = int64_t{0x0101010101010101};
  const auto words = static_cast<uint64_t>(kSize / 8);
  EXPECT_EQ(static_cast<uint64_t>(quick_checksum(bytes)),
            words * static_cast<uint64_t>(word_of_ones) + 0x0101010101);
  Content good(bytes, "the same", quick_checksum(bytes));
  EXPECT_TRUE(good.verify(Check::kQuick, false));
  for (const int64_t position : {int64_t{0}, kSize / 4 + 1, kSize / 2, kSize - 1}) {
    at::Tensor changed = bytes.clone();
    changed[position] = 2;
    Content bad(changed, "the same", quick_checksum(bytes));
    EXPECT_FALSE(bad.verify(Check::kQuick, false)) << position;
    EXPECT_NE(address(bad), address(good));
  }
}

TEST(Content, ManyThreadsEndWithOneCopy) {
  constexpr int kThreads = 16;
  for (int round = 0; round < 50; ++round) {
    std::vector<std::unique_ptr<Content>> contents;
    for (int i = 0; i < kThreads; ++i) {
      const at::Tensor bytes = bytes_from(round, 5000);
      contents.push_back(std::make_unique<Content>(bytes, digest_of(bytes), quick_checksum(bytes)));
    }
    std::latch begin(kThreads);
    std::atomic<int> good{0};
    std::vector<std::thread> threads;
    for (auto& content : contents) {
      threads.emplace_back([&] {
        begin.arrive_and_wait();
        if (content->verify(Check::kFull, false)) ++good;
      });
    }
    for (auto& thread : threads) thread.join();
    ASSERT_EQ(good, kThreads);
    for (auto& content : contents) ASSERT_EQ(address(*content), address(*contents[0]));
  }
}

}  // namespace
}  // namespace neuron::runtime
