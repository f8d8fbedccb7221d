#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/sha256.h"
#include "runtime/core_lock.h"
#include "runtime/host/cpu_topology.h"
#include "runtime/settings.h"
#include "runtime/visible_cores.h"

namespace neuron::runtime {
namespace {

using Cores = std::vector<int32_t>;

TEST(ParseCoreList, ReadsSinglesRangesAndMixesInTheOrderWritten) {
  EXPECT_EQ(parse_core_list("3", 8), (Cores{3}));
  EXPECT_EQ(parse_core_list("0-3", 8), (Cores{0, 1, 2, 3}));
  EXPECT_EQ(parse_core_list("0,1", 8), (Cores{0, 1}));
  EXPECT_EQ(parse_core_list("6,5", 8), (Cores{6, 5}));
  EXPECT_EQ(parse_core_list("7,0-2,5", 8), (Cores{7, 0, 1, 2, 5}));
  EXPECT_EQ(parse_core_list(" 1 , 2 - 3 ", 8), (Cores{1, 2, 3}));
}

TEST(ParseCoreList, RejectsJunkQuotingItAndWhatExists) {
  for (const char* junk : {"", " ", "a", "1,", ",1", "1-", "-1", "3-1", "1-2-3", "8", "0-8", "1,1",
                           "0-2,1", "1.5", "0x1", "99999999999999999999", "1;2"}) {
    try {
      parse_core_list(junk, 8);
      ADD_FAILURE() << "accepted '" << junk << "'";
    } catch (const std::runtime_error& error) {
      const std::string text = error.what();
      EXPECT_NE(text.find("'" + std::string(junk) + "'"), std::string::npos) << text;
      EXPECT_NE(text.find("8 cores (0-7)"), std::string::npos) << text;
    }
  }
}

/// What a child process, forked now, makes of `take`: the pid of the holder it is told, or 0.
pid_t holder_seen_by_child(const Cores& cores) {
  int pipe_ends[2];
  EXPECT_EQ(::pipe(pipe_ends), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    CoreLock lock("test");
    const auto holder = lock.take(cores);
    const pid_t pid = holder ? holder->pid : 0;
    [[maybe_unused]] const auto written = ::write(pipe_ends[1], &pid, sizeof(pid));
    ::_exit(0);
  }
  pid_t pid = -1;
  EXPECT_EQ(::read(pipe_ends[0], &pid, sizeof(pid)), static_cast<ssize_t>(sizeof(pid)));
  ::close(pipe_ends[0]);
  ::close(pipe_ends[1]);
  ::waitpid(child, nullptr, 0);
  return pid;
}

TEST(CoreLock, KeepsOtherProcessesOutAndNamesTheHolder) {
  std::string folder = std::filesystem::temp_directory_path() / "neuron_ext_test.XXXXXX";
  ASSERT_NE(::mkdtemp(folder.data()), nullptr);
  ::setenv("NEURON_EXT_LOCK_DIR", folder.c_str(), 1);
  {
    CoreLock lock("test");
    ASSERT_FALSE(lock.take({1, 2}));
    EXPECT_EQ(holder_seen_by_child({2}), ::getpid());
    EXPECT_EQ(holder_seen_by_child({0, 1}), ::getpid());
    EXPECT_EQ(holder_seen_by_child({0, 3}), 0);
  }
  EXPECT_EQ(holder_seen_by_child({1, 2}), 0);
  ::unsetenv("NEURON_EXT_LOCK_DIR");
  std::filesystem::remove_all(folder);
}

TEST(CpuTopology, SharesCpusEqually) {
  using host::share_cpus;
  using Shares = std::vector<Cores>;
  EXPECT_EQ(share_cpus({0, 1, 2, 3}, 4), (Shares{{0}, {1}, {2}, {3}}));
  EXPECT_EQ(share_cpus({0, 1, 2, 3}, 2), (Shares{{0, 1}, {2, 3}}));
  EXPECT_EQ(share_cpus({4, 6, 9}, 2), (Shares{{4}, {6, 9}}));
  EXPECT_EQ(share_cpus({5, 7}, 4), (Shares{{5}, {7}, {5}, {7}}));
  EXPECT_EQ(share_cpus({3}, 1), (Shares{{3}}));
}

TEST(CpuTopology, ReadsCgroupGrants) {
  using host::parse_cpu_max;
  EXPECT_EQ(parse_cpu_max("200000 100000"), 2);
  EXPECT_EQ(parse_cpu_max("150000 100000"), 2);
  EXPECT_EQ(parse_cpu_max("50000 100000"), 1);
  EXPECT_EQ(parse_cpu_max("max 100000"), std::nullopt);
  EXPECT_EQ(parse_cpu_max("-1 100000"), std::nullopt);
  EXPECT_EQ(parse_cpu_max(""), std::nullopt);
}

TEST(CpuTopology, FindsAtLeastOneCpu) {
  const auto budget = host::cpu_budget();
  EXPECT_GE(budget.cpus.size(), 1U);
  EXPECT_GE(budget.usable, 1);
  EXPECT_LE(budget.usable, static_cast<int32_t>(budget.cpus.size()));
}

TEST(Sha256, AgreesWithTheStandardsExamples) {
  EXPECT_EQ(sha256_hex("", 0), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256_hex("abc", 3),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  const std::string two_blocks = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
  EXPECT_EQ(sha256_hex(two_blocks.data(), two_blocks.size()),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  const std::string million(1000000, 'a');
  EXPECT_EQ(sha256_hex(million.data(), million.size()),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

}  // namespace
}  // namespace neuron::runtime
