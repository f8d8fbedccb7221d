#include "placement/placement.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <thread>
#include <vector>

#include "placement/context.h"

namespace neuron {
namespace {

int32_t window(const std::vector<int64_t>& loads, int32_t count) {
  return least_used_window(loads, count);
}

TEST(LeastUsedWindow, TakesTheSmallestSumAndOfEqualOnesTheLowest) {
  EXPECT_EQ(window({0, 0, 0, 0}, 1), 0);
  EXPECT_EQ(window({1, 0, 0, 0}, 1), 1);
  EXPECT_EQ(window({1, 1, 1, 1}, 1), 0);
  EXPECT_EQ(window({1, 0, 1, 0}, 2), 0);
  EXPECT_EQ(window({1, 1, 0, 0}, 2), 2);
  EXPECT_EQ(window({0, 3, 0, 1, 1}, 2), 2);
  EXPECT_EQ(window({5, 4, 3}, 3), 0);
  EXPECT_EQ(window({2, 0, 0, 2, 0}, 2), 1);
}

TEST(LeastUsedWindow, SuccessiveLoadsGoRoundAndWrap) {
  std::vector<int64_t> loads(4, 0);
  std::vector<int32_t> taken;
  for (int i = 0; i < 6; ++i) {
    taken.push_back(window(loads, 1));
    ++loads[taken.back()];
  }
  EXPECT_EQ(taken, (std::vector<int32_t>{0, 1, 2, 3, 0, 1}));
}

std::string refusal(Placement placement, int32_t visible) {
  try {
    EXPECT_EQ(make_placement(placement.start_nc, placement.nc_count, visible), placement);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "accepted";
}

TEST(MakePlacement, AcceptsWhatFits) {
  for (const Placement placement : {Placement{-1, -1}, Placement{0, 4}, Placement{3, 1},
                                    Placement{3, -1}, Placement{-1, 4}, Placement{2, 2}}) {
    EXPECT_EQ(refusal(placement, 4), "accepted") << to_string(placement);
  }
}

TEST(MakePlacement, NamesTheValueTheVisibleCoresAndTheRemedy) {
  const std::vector<std::pair<Placement, std::string>> cases = {
      {{0, 0}, "nc_count=0"},   {{0, -2}, "nc_count=-2"},  {{0, 5}, "nc_count=5"},
      {{-2, 1}, "start_nc=-2"}, {{4, 1}, "start_nc=4"},    {{99, -1}, "start_nc=99"},
      {{3, 2}, "start_nc=3"},   {{-1, 99}, "nc_count=99"},
  };
  for (const auto& [placement, value] : cases) {
    const std::string text = refusal(placement, 4);
    EXPECT_NE(text.find(value), std::string::npos) << text;
    EXPECT_NE(text.find("sees 4 cores (0-3)"), std::string::npos) << text;
    EXPECT_NE(text.find("; use "), std::string::npos) << text;
  }
}

TEST(MakePlacement, NumbersOfMoreThan32BitsDoNotWrapAround) {
  EXPECT_THROW(make_placement(int64_t{1} << 32, 1, 4), std::invalid_argument);
  EXPECT_THROW(make_placement(0, (int64_t{1} << 32) + 1, 4), std::invalid_argument);
}

TEST(PlacementContext, NestsAndRestores) {
  EXPECT_FALSE(current_placement_context());
  const int64_t outer = enter_placement_context({1, 2});
  const int64_t inner = enter_placement_context({3, 1});
  EXPECT_EQ(*current_placement_context(), (Placement{3, 1}));
  exit_placement_context(inner);
  EXPECT_EQ(*current_placement_context(), (Placement{1, 2}));
  exit_placement_context(outer);
  EXPECT_FALSE(current_placement_context());
}

TEST(PlacementContext, ClosesOutOfOrder) {
  const int64_t first = enter_placement_context({1, 1});
  const int64_t second = enter_placement_context({2, 1});
  exit_placement_context(first);
  EXPECT_EQ(*current_placement_context(), (Placement{2, 1}));
  exit_placement_context(second);
  EXPECT_THROW(exit_placement_context(second), std::invalid_argument);
}

TEST(PlacementContext, SixteenThreadsNeverMix) {
  std::vector<std::thread> threads;
  std::vector<int> mixed(16, 0);
  for (int32_t id = 0; id < 16; ++id) {
    threads.emplace_back([id, &mixed] {
      for (int i = 0; i < 2000; ++i) {
        if (current_placement_context()) ++mixed[id];
        const int64_t outer = enter_placement_context({id, 1});
        const int64_t inner = enter_placement_context({id, 2});
        if (current_placement_context() != Placement{id, 2}) ++mixed[id];
        exit_placement_context(inner);
        if (current_placement_context() != Placement{id, 1}) ++mixed[id];
        exit_placement_context(outer);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(mixed, std::vector<int>(16, 0));
}

}  // namespace
}  // namespace neuron
