#pragma once

#include <string>
#include <vector>

namespace neuron::ed25519 {

/// Ed25519 (RFC 8032) by OpenSSL's libcrypto, which is mapped when one of these is first called:
/// who signs nothing needs no OpenSSL. Thread-safe.
///
/// All throw std::runtime_error if there is no libcrypto. Keys and signatures are raw bytes.
constexpr size_t kKeyBytes = 32;
constexpr size_t kSignatureBytes = 64;

struct Signed {
  std::string public_key;
  std::string signature;
};

/// @param private_key PEM, PKCS #8, as `openssl genpkey -algorithm ed25519` writes it.
/// @throws std::invalid_argument if it is anything else, or encrypted.
Signed sign(const std::string& private_key, const std::string& message);

/// Whether `signature` is the key's for `message`. False for keys and signatures of a wrong length.
bool verify(const std::string& public_key, const std::string& signature,
            const std::string& message);

/// The keys in `pem`, any number of blocks as `openssl pkey -pubout` writes them.
/// @throws std::invalid_argument if there is none, or one is of another kind.
std::vector<std::string> public_keys(const std::string& pem);

}  // namespace neuron::ed25519
