#include "runtime/host/native_library.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <vector>

#include "common/message.h"
#include "common/mutex.h"
#include "runtime/host/parallel_regions.h"

namespace neuron::runtime::host {
namespace {

/// A file without a name, gone with its last descriptor.
class AnonymousFile {
 public:
  AnonymousFile() : fd_(open_memory_file()) {
    if (fd_ >= 0) return;
    const std::string first = std::strerror(errno);
    // Where the system refuses memory files, a nameless file on disk does as well.
    std::vector<std::string> folders{"/dev/shm"};
    if (const char* temporary = std::getenv("TMPDIR")) folders.emplace_back(temporary);
    folders.emplace_back("/tmp");
    for (const auto& folder : folders) {
      fd_ = ::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0700);
      if (fd_ >= 0) return;
    }
    throw std::runtime_error(message("native code cannot be mapped: memfd_create says '", first,
                                     "', and no nameless file can be made in ", join(folders),
                                     " ('", std::strerror(errno), "')"));
  }
  ~AnonymousFile() { ::close(fd_); }
  AnonymousFile(const AnonymousFile&) = delete;
  AnonymousFile& operator=(const AnonymousFile&) = delete;

  int fd() const { return fd_; }

  void write(const char* data, size_t size) const {
    while (size > 0) {
      const ssize_t written = ::write(fd_, data, size);
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) {
        throw std::runtime_error(message("native code cannot be mapped: ", std::strerror(errno)));
      }
      data += written;
      size -= static_cast<size_t>(written);
    }
  }

 private:
  static int open_memory_file() {
#ifdef MFD_EXEC
    // Asked for by name where the system's default is memory files that may not be executed.
    const int fd = ::memfd_create("neuron_ext", MFD_CLOEXEC | MFD_EXEC);
    if (fd >= 0 || errno != EINVAL) return fd;
#endif
    return ::memfd_create("neuron_ext", MFD_CLOEXEC);
  }

  int fd_;
};

/// A path to the open file that no other mapping of this process had. The dynamic linker takes a
/// library for one it has by its path, and descriptor numbers come back; so the path carries a
/// serial number, written with the two neutral ways to end a folder: "/" and "/./".
std::string unique_path(int fd, uint32_t serial) {
  std::string path = "/proc/self/fd";
  for (; serial != 0; serial >>= 1) path += (serial & 1) != 0 ? "/." : "/";
  return message(path, "/", fd);
}

}  // namespace

void* map_native_library(const at::Tensor& code, const std::string& sha256) {
  static Mutex mutex;
  static auto& mapped = *new std::map<std::string, void*>();
  static uint32_t serial = 0;

  MutexLock lock(mutex);
  const auto found = mapped.find(sha256);
  if (found != mapped.end()) return found->second;
  const AnonymousFile file;
  file.write(static_cast<const char*>(code.const_data_ptr()), static_cast<size_t>(code.numel()));
  void* handle = ::dlopen(unique_path(file.fd(), ++serial).c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* reason = ::dlerror();
    throw std::runtime_error(
        message("native code cannot be mapped: ",
                reason != nullptr ? reason : "the dynamic linker gave no reason"));
  }
  serve_parallel_regions(handle);
  mapped.emplace(sha256, handle);
  return handle;
}

}  // namespace neuron::runtime::host
