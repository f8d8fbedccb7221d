#include "runtime/core_lock.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <thread>
#include <utility>

#include "common/message.h"

namespace neuron::runtime {
namespace {

// The byte of the file that stands for the turn: behind those of all cores.
constexpr int32_t kTurn = std::numeric_limits<int32_t>::max();
constexpr auto kLongestTurn = std::chrono::seconds(2);

struct flock byte_of(int32_t core, short type) {
  struct flock range{};
  range.l_type = type;
  range.l_whence = SEEK_SET;
  range.l_start = core;
  range.l_len = 1;
  return range;
}

std::string command_of(pid_t pid) {
  std::ifstream file(message("/proc/", pid, "/cmdline"), std::ios::binary);
  std::string command((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  while (!command.empty() && command.back() == '\0') command.pop_back();
  std::replace(command.begin(), command.end(), '\0', ' ');
  constexpr size_t kMost = 200;
  if (command.size() > kMost) command = command.substr(0, kMost) + "...";
  return command;
}

std::vector<std::string> lock_folders() {
  if (const char* named = std::getenv("NEURON_EXT_LOCK_DIR")) return {named};
  std::vector<std::string> folders{"/dev/shm"};
  if (const char* temporary = std::getenv("TMPDIR")) folders.emplace_back(temporary);
  folders.emplace_back("/tmp");
  return folders;
}

}  // namespace

std::string CoreHolder::describe() const {
  if (pid <= 0) return message("core ", core, " is held by a process of another container");
  return message("core ", core, " is held by process ", pid, " (",
                 command.empty() ? "command unknown" : command, ")");
}

CoreLock::CoreLock(CoreLock&& other) noexcept
    : device_name_(std::move(other.device_name_)), fd_(std::exchange(other.fd_, -1)) {}

CoreLock::~CoreLock() {
  if (fd_ >= 0) ::close(fd_);
}

void CoreLock::open_file() {
  std::vector<std::string> tried;
  for (const std::string& folder : lock_folders()) {
    const std::string path = message(folder, "/neuron_ext-", device_name_, ".lock");
    // Without O_CREAT first: the kernel may refuse to "create" another user's file in a sticky
    // folder (fs.protected_regular).
    fd_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (fd_ < 0) {
      fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
      // Other users' processes compete for the same cores; the umask must not shut them out.
      if (fd_ >= 0 && ::fchmod(fd_, 0666) != 0 && errno != EPERM) {
        tried.push_back(message(path, ": ", std::strerror(errno)));
        ::close(std::exchange(fd_, -1));
        continue;
      }
    }
    if (fd_ >= 0) return;
    tried.push_back(message(path, ": ", std::strerror(errno)));
  }
  throw std::runtime_error(message("cores cannot be reserved, no lock file can be opened (",
                                   join(tried, "; "),
                                   "): set NEURON_EXT_LOCK_DIR to a folder that "
                                   "all processes may write to"));
}

CoreLock::Turn::~Turn() {
  if (fd_ < 0) return;
  struct flock turn = byte_of(kTurn, F_UNLCK);
  ::fcntl(fd_, F_SETLK, &turn);
}

CoreLock::Turn CoreLock::turn() {
  if (fd_ < 0) open_file();
  const auto end = std::chrono::steady_clock::now() + kLongestTurn;
  struct flock turn = byte_of(kTurn, F_WRLCK);
  // Not F_SETLKW, which waits for ever.
  while (::fcntl(fd_, F_SETLK, &turn) != 0) {
    if (std::chrono::steady_clock::now() > end) return Turn(-1);
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  return Turn(fd_);
}

std::optional<CoreHolder> CoreLock::take(const std::vector<int32_t>& cores) {
  if (fd_ < 0) open_file();
  for (size_t i = 0; i < cores.size(); ++i) {
    struct flock wanted = byte_of(cores[i], F_WRLCK);
    if (::fcntl(fd_, F_SETLK, &wanted) == 0) continue;
    const int error = errno;
    for (size_t j = 0; j < i; ++j) {
      struct flock taken = byte_of(cores[j], F_UNLCK);
      ::fcntl(fd_, F_SETLK, &taken);
    }
    if (error != EAGAIN && error != EACCES) {
      throw std::runtime_error(message(
          "core ", cores[i], " cannot be reserved: ", std::strerror(error), " on the lock file"));
    }
    CoreHolder holder{cores[i], 0, ""};
    struct flock asked = byte_of(cores[i], F_WRLCK);
    if (::fcntl(fd_, F_GETLK, &asked) == 0 && asked.l_type != F_UNLCK) {
      holder.pid = asked.l_pid;
      holder.command = command_of(asked.l_pid);
    }
    return holder;
  }
  return std::nullopt;
}

}  // namespace neuron::runtime
