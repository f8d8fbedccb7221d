#include "runtime/content.h"

#include <c10/util/intrusive_ptr.h>

#include <atomic>
#include <cstring>
#include <map>
#include <utility>

#include "common/parallel.h"
#include "common/sha256.h"
#include "runtime/quick_checksum.h"

namespace neuron::runtime {
namespace {

/// The bytes in use in this process, by what is said to be their digest. Thread-safe. What stands
/// here may have another digest: nothing is taken from here before it was compared.
class Pool {
 public:
  struct Found {
    at::Tensor bytes;  ///< undefined if there are none
    bool quickly_checked = false;
    bool fully_checked = false;
  };

  static Pool& get() {
    static auto& pool = *new Pool();  // others may use it until the very end of the process
    return pool;
  }

  Found find(const std::string& sha256) const {
    MutexLock lock(mutex_);
    const auto entry = entries_.find(sha256);
    if (entry == entries_.end()) return {};
    return {at::Tensor(entry->second.bytes.lock()), entry->second.quickly_checked,
            entry->second.fully_checked};
  }

  /// Keeps in mind that the bytes are there, unless others of this digest are.
  void offer(const std::string& sha256, const at::Tensor& bytes) {
    MutexLock lock(mutex_);
    std::erase_if(entries_, [](const auto& entry) { return entry.second.bytes.expired(); });
    entries_.try_emplace(sha256, bytes);
  }

  /// Keeps in mind that the bytes were checked, if they are the ones kept here.
  void note_check(const std::string& sha256, const at::Tensor& bytes, Content::Check check) {
    MutexLock lock(mutex_);
    const auto entry = entries_.find(sha256);
    if (entry == entries_.end()) return;
    if (!at::Tensor(entry->second.bytes.lock()).is_same(bytes)) return;
    entry->second.quickly_checked = true;
    if (check == Content::Check::kFull) entry->second.fully_checked = true;
  }

 private:
  struct Entry {
    explicit Entry(const at::Tensor& tensor) : bytes(tensor.getIntrusivePtr()) {}
    c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> bytes;
    bool quickly_checked = false;
    bool fully_checked = false;
  };

  mutable Mutex mutex_;
  std::map<std::string, Entry> entries_ GUARDED_BY(mutex_);
};

bool equal_bytes(const at::Tensor& one, const at::Tensor& other) {
  if (one.numel() != other.numel()) return false;
  const auto* data = static_cast<const uint8_t*>(one.const_data_ptr());
  const auto* other_data = static_cast<const uint8_t*>(other.const_data_ptr());
  if (data == other_data || one.numel() == 0) return true;
  std::atomic<bool> equal{true};
  in_parallel(static_cast<size_t>(one.numel()), [&](size_t begin, size_t end) {
    if (std::memcmp(data + begin, other_data + begin, end - begin) != 0) equal = false;
  });
  return equal;
}

}  // namespace

Content::Content(at::Tensor bytes, std::string sha256, std::optional<int64_t> checksum)
    : sha256_(std::move(sha256)), checksum_(checksum), bytes_(std::move(bytes)) {
  Pool::get().offer(sha256_, bytes_);
}

at::Tensor Content::bytes() const {
  MutexLock lock(mutex_);
  return bytes_;
}

bool Content::has_digest(Check check) const {
  const at::Tensor kept = bytes();
  if (check == Check::kQuick && checksum_) return quick_checksum(kept) == *checksum_;
  return sha256_hex(kept.const_data_ptr(), static_cast<size_t>(kept.numel())) == sha256_;
}

bool Content::verify(Check check, bool anew) {
  const at::Tensor mine = bytes();
  const Pool::Found found = Pool::get().find(sha256_);
  const bool shared = found.bytes.defined() && equal_bytes(mine, found.bytes);
  if (shared && !found.bytes.is_same(mine)) {
    MutexLock lock(mutex_);
    bytes_ = found.bytes;
  }
  const bool checked = check == Check::kFull ? found.fully_checked : found.quickly_checked;
  if (shared && checked && !anew) return true;
  if (!has_digest(check)) return false;
  Pool::get().offer(sha256_, bytes());  // those of before may be gone
  Pool::get().note_check(sha256_, bytes(), check);
  return true;
}

}  // namespace neuron::runtime
