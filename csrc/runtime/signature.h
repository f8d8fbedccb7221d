#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/mutex.h"

namespace neuron::runtime {

struct Executable;

/// Who vouches for an executable. Digits are hexadecimal.
struct Signature {
  std::string digest;  ///< SHA-256 of what is signed, computed here and never read from a file
  std::string signer;  ///< Ed25519 public key, 64 digits
  std::string bytes;   ///< 128 digits
};

/// Where the signature of an executable stands, which is otherwise never changed: it may be signed
/// later. Thread-safe.
class SignatureSlot {
 public:
  std::optional<Signature> get() const EXCLUDES(mutex_);
  void set(Signature signature) EXCLUDES(mutex_);

 private:
  mutable Mutex mutex_;
  std::optional<Signature> signature_ GUARDED_BY(mutex_);
};

/// @param private_key PEM.
/// @throws std::invalid_argument naming what is wrong with the key.
Signature sign(const std::string& digest, const std::string& private_key);

/// @throws std::invalid_argument naming the file if it cannot be read.
std::string read_key_file(const std::string& path);

/// The public keys in the PEM file `path`, as 64 hexadecimal digits each.
/// @throws std::invalid_argument naming the file if it cannot be read or holds anything else.
std::vector<std::string> read_public_keys(const std::string& path);

/// Why `executable` does not count as signed by one of `trusted`; empty if it is. The bytes of its
/// contents are for `check_integrity` to look at: the digest covers their digests.
std::string distrust(const Executable& executable, const std::vector<std::string>& trusted);

}  // namespace neuron::runtime
