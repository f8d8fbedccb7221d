#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "common/mutex.h"

namespace neuron::runtime {

/// Bytes of an executable, code, weights or a graph, with the digests that were saved with them.
///
/// A process keeps equal bytes once, whichever way they came in: repeated loads of a file, copies
/// of a module, a trace and the file it was saved to. `verify` is where that happens; the bytes go
/// with their last user. Thread-safe.
class Content {
 public:
  enum class Check {
    kQuick,  ///< `quick_checksum` where one was saved, else SHA-256
    kFull,   ///< SHA-256
  };

  /// @param bytes one-dimensional contiguous uint8 on the CPU. Shared, not copied; never written to
  /// from here on.
  /// @param sha256 as hexadecimal digits. Neither digest is believed before `verify`.
  Content(at::Tensor bytes, std::string sha256, std::optional<int64_t> checksum);

  /// The bytes as they are kept now: `verify` may put equal ones in their place.
  at::Tensor bytes() const;

  const std::string& sha256() const { return sha256_; }
  const std::optional<int64_t>& checksum() const { return checksum_; }

  /// Compares the bytes with their digest and returns whether they have it. Bytes that the process
  /// already has, and has checked as thoroughly, are compared with those instead, byte by byte, and
  /// given up in their favour.
  /// @param anew to compute the digest in any case.
  bool verify(Check check, bool anew);

 private:
  bool has_digest(Check check) const EXCLUDES(mutex_);

  const std::string sha256_;
  const std::optional<int64_t> checksum_;
  mutable Mutex mutex_;
  at::Tensor bytes_ GUARDED_BY(mutex_);
};

using ContentPtr = std::shared_ptr<Content>;

}  // namespace neuron::runtime
