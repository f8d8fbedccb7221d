#include "runtime/signature.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <utility>

#include "common/ed25519.h"
#include "common/message.h"
#include "runtime/executable.h"

namespace neuron::runtime {
namespace {

/// What a signature is made over: it says what the digest is one of, so that the signature means
/// nothing elsewhere.
std::string signed_message(const std::string& digest) {
  return "neuron_ext subgraph 1 sha256:" + digest;
}

std::string to_hex(const std::string& bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string digits;
  for (const char c : bytes) {
    const auto byte = static_cast<unsigned char>(c);
    digits += kDigits[byte >> 4];
    digits += kDigits[byte & 15];
  }
  return digits;
}

/// @param digits was checked where it was read.
std::string from_hex(const std::string& digits) {
  std::string bytes;
  for (size_t i = 0; i + 1 < digits.size(); i += 2) {
    bytes += static_cast<char>(std::stoi(digits.substr(i, 2), nullptr, 16));
  }
  return bytes;
}

}  // namespace

std::optional<Signature> SignatureSlot::get() const {
  const MutexLock lock(mutex_);
  return signature_;
}

void SignatureSlot::set(Signature signature) {
  const MutexLock lock(mutex_);
  signature_ = std::move(signature);
}

Signature sign(const std::string& digest, const std::string& private_key) {
  const auto made = ed25519::sign(private_key, signed_message(digest));
  return {digest, to_hex(made.public_key), to_hex(made.signature)};
}

std::string read_key_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string pem{std::istreambuf_iterator<char>(file), {}};
  if (!file.is_open() || file.bad()) {
    throw std::invalid_argument(message("the key file '", path, "' cannot be read"));
  }
  return pem;
}

std::vector<std::string> read_public_keys(const std::string& path) {
  const std::string pem = read_key_file(path);
  try {
    std::vector<std::string> keys = ed25519::public_keys(pem);
    for (auto& key : keys) key = to_hex(key);
    return keys;
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(message("'", path, "' ", error.what()));
  }
}

std::string distrust(const Executable& executable, const std::vector<std::string>& trusted) {
  const auto signature = executable.signature->get();
  if (!signature) return "it is not signed";
  if (std::find(trusted.begin(), trusted.end(), signature->signer) == trusted.end()) {
    return message("it is signed by ", signature->signer, ", which is not a trusted key");
  }
  if (!ed25519::verify(from_hex(signature->signer), from_hex(signature->bytes),
                       signed_message(signature->digest))) {
    return message("its signature is not one of ", signature->signer, " for what it holds");
  }
  return "";
}

}  // namespace neuron::runtime
