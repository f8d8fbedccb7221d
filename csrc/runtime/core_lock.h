#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace neuron::runtime {

/// A process that holds a core.
struct CoreHolder {
  int32_t core = -1;  ///< index on the machine
  pid_t pid = 0;      ///< 0 if it cannot be seen from here
  std::string command;

  /// "core 3 is held by process 123 (python serve.py)".
  std::string describe() const;
};

/// Cores reserved for this process against other processes of this machine.
///
/// One byte of a lock file per core, under a POSIX record lock: the kernel frees it the moment the
/// process ends, however it ends, and a forked child does not inherit it. The file is empty and
/// lives in /dev/shm, else the temporary folder; NEURON_EXT_LOCK_DIR names another place. A process
/// may have one CoreLock at a time that holds anything: closing it frees all of the process's
/// bytes. Not thread-safe.
class CoreLock {
 public:
  /// While it lives, no other process chooses cores. Without it, of two that try one core after the
  /// other, each could be refused because of what the other was about to give back.
  class Turn {
   public:
    Turn(Turn&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Turn& operator=(Turn&& other) = delete;
    ~Turn();

   private:
    friend class CoreLock;
    explicit Turn(int fd) noexcept : fd_(fd) {}
    int fd_;
  };

  /// @param device_name tells the cores of one kind of device from another's. Opens nothing yet.
  explicit CoreLock(std::string device_name) : device_name_(std::move(device_name)) {}
  CoreLock(CoreLock&& other) noexcept;
  CoreLock& operator=(CoreLock&& other) = delete;
  ~CoreLock();

  /// Waits for the other processes that choose cores, each of which takes microseconds. One that is
  /// stopped meanwhile holds nobody up for longer than two seconds. Must end before this object.
  /// @throws std::runtime_error if the lock file cannot be used.
  [[nodiscard]] Turn turn();

  /// Reserves all of `cores`, or none and tells who holds one of them.
  /// @throws std::runtime_error if the lock file cannot be used.
  std::optional<CoreHolder> take(const std::vector<int32_t>& cores);

 private:
  void open_file();

  std::string device_name_;
  int fd_ = -1;
};

}  // namespace neuron::runtime
