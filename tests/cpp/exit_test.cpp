// The end of a C++ process, whose threads may still ask for inferences.
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <thread>

#include "runtime/runtime.h"

namespace neuron::runtime {
namespace {

constexpr int kOwnCode = 3;
constexpr int kTornDown = 99;

/// What exit() calls, last registered first, when it comes to static objects.
void tear_down() {
  ::_exit(kTornDown);
}

void make_runtime() {
  ::setenv("NEURON_EXT_RUNTIME", "host", 1);
  ::setenv("NEURON_EXT_HOST_CORES", "2", 1);
  Runtime::get();
}

/// Threads that enter and leave as requests do, and as loads do.
[[noreturn]] void exit_with_threads_under_way() {
  make_runtime();
  {
    const ExitGate first_request;
  }
  std::atexit(tear_down);  // a static object that was made by the first inference
  std::atomic<int> started{0};
  for (int i = 0; i < 4; ++i) {
    std::thread([&started, loads = i == 3] {
      for (bool first = true;; first = false) {
        if (loads) {
          ExitGate::pass_load();
        } else {
          const ExitGate request;
        }
        if (first) ++started;
      }
    }).detach();
  }
  while (started < 4) std::this_thread::yield();
  std::exit(kOwnCode);
}

[[noreturn]] void exit_with_nothing_under_way() {
  std::atexit(tear_down);
  make_runtime();
  std::thread([] { const ExitGate request; }).join();
  std::exit(kOwnCode);
}

class ExitDeathTest : public ::testing::Test {
 protected:
  ExitDeathTest() { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
};

TEST_F(ExitDeathTest, WithRequestsUnderWayLeavesBeforeStaticObjectsGo) {
  EXPECT_EXIT(exit_with_threads_under_way(), ::testing::ExitedWithCode(kOwnCode), "");
}

TEST_F(ExitDeathTest, WithNothingUnderWayCallsWhatElseIsRegistered) {
  EXPECT_EXIT(exit_with_nothing_under_way(), ::testing::ExitedWithCode(kTornDown), "");
}

}  // namespace
}  // namespace neuron::runtime
