#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>
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
  /// @param device_name tells the cores of one kind of device from another's. Opens nothing yet.
  explicit CoreLock(std::string device_name) : device_name_(std::move(device_name)) {}
  CoreLock(CoreLock&& other) noexcept;
  CoreLock& operator=(CoreLock&& other) = delete;
  ~CoreLock();

  /// Reserves all of `cores`, or none and tells who holds one of them.
  /// @throws std::runtime_error if the lock file cannot be used.
  std::optional<CoreHolder> take(const std::vector<int32_t>& cores);

 private:
  void open_file();

  std::string device_name_;
  int fd_ = -1;
};

}  // namespace neuron::runtime
