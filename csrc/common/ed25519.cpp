#include "common/ed25519.h"

#include <dlfcn.h>

#include <array>
#include <memory>
#include <new>
#include <stdexcept>
#include <type_traits>

#include "common/message.h"

namespace neuron::ed25519 {
namespace {

constexpr int kTypeEd25519 = 1087;  // EVP_PKEY_ED25519 of OpenSSL 1.1.1 and later

using Password = int (*)(char*, int, int, void*);

/// The functions of libcrypto that are needed here, by the prototypes of OpenSSL's manual.
/// Objects are opaque.
class Crypto {
 public:
  static const Crypto& get() {
    static const auto& crypto = *new Crypto();
    return crypto;
  }

  void* (*bio_new)(const void*, int);
  int (*bio_free)(void*);
  void* (*read_private)(void*, void**, Password, void*);
  void* (*read_public)(void*, void**, Password, void*);
  void* (*new_public)(int, void*, const unsigned char*, size_t);
  int (*raw_public)(const void*, unsigned char*, size_t*);
  void (*key_free)(void*);
  void* (*context_new)();
  void (*context_free)(void*);
  int (*sign_init)(void*, void**, const void*, void*, void*);
  int (*sign)(void*, unsigned char*, size_t*, const unsigned char*, size_t);
  int (*verify_init)(void*, void**, const void*, void*, void*);
  int (*verify)(void*, const unsigned char*, size_t, const unsigned char*, size_t);
  void (*clear_errors)();

 private:
  Crypto() {
    void* library = nullptr;
    for (const char* name : {"libcrypto.so.3", "libcrypto.so.1.1"}) {
      if (library == nullptr) library = ::dlopen(name, RTLD_NOW | RTLD_LOCAL);
    }
    if (library == nullptr) {
      throw std::runtime_error(
          "signatures need OpenSSL, and neither libcrypto.so.3 nor libcrypto.so.1.1 is found: "
          "install it (Debian and Ubuntu: libssl3)");
    }
    const auto find = [&](auto& function, const char* name) {
      function =
          reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(library, name));
      if (function == nullptr) {
        throw std::runtime_error(
            message("signatures need OpenSSL 1.1.1 or later: its libcrypto "
                    "here has no ",
                    name));
      }
    };
    find(bio_new, "BIO_new_mem_buf");
    find(bio_free, "BIO_free");
    find(read_private, "PEM_read_bio_PrivateKey");
    find(read_public, "PEM_read_bio_PUBKEY");
    find(new_public, "EVP_PKEY_new_raw_public_key");
    find(raw_public, "EVP_PKEY_get_raw_public_key");
    find(key_free, "EVP_PKEY_free");
    find(context_new, "EVP_MD_CTX_new");
    find(context_free, "EVP_MD_CTX_free");
    find(sign_init, "EVP_DigestSignInit");
    find(sign, "EVP_DigestSign");
    find(verify_init, "EVP_DigestVerifyInit");
    find(verify, "EVP_DigestVerify");
    find(clear_errors, "ERR_clear_error");
  }
};

struct Free {
  void (*function)(void*);
  void operator()(void* object) const { function(object); }
};
using Handle = std::unique_ptr<void, Free>;

Handle owned_key(void* key) {
  return {key, {Crypto::get().key_free}};
}

Handle new_context() {
  const Crypto& crypto = Crypto::get();
  Handle context(crypto.context_new(), {crypto.context_free});
  if (context == nullptr) throw std::bad_alloc();
  return context;
}

Handle reader_of(const std::string& pem) {
  const Crypto& crypto = Crypto::get();
  Handle bio(crypto.bio_new(pem.data(), static_cast<int>(pem.size())),
             {[](void* object) { Crypto::get().bio_free(object); }});
  if (bio == nullptr) throw std::bad_alloc();
  return bio;
}

/// In place of OpenSSL's own, which would ask at the terminal.
int no_password(char* /*buffer*/, int /*size*/, int /*writing*/, void* /*user*/) {
  return -1;
}

const unsigned char* bytes_of(const std::string& text) {
  return reinterpret_cast<const unsigned char*>(text.data());
}

/// Empty if `key` is not an Ed25519 key: X25519 keys are as long, but verify nothing.
std::string raw_public_key(void* key) {
  const Crypto& crypto = Crypto::get();
  if (crypto.verify_init(new_context().get(), nullptr, nullptr, nullptr, key) != 1) return "";
  std::array<unsigned char, kKeyBytes> raw{};
  size_t size = raw.size();
  if (crypto.raw_public(key, raw.data(), &size) != 1 || size != kKeyBytes) return "";
  return {raw.begin(), raw.end()};
}

}  // namespace

Signed sign(const std::string& private_key, const std::string& message) {
  const Crypto& crypto = Crypto::get();
  const Handle key =
      owned_key(crypto.read_private(reader_of(private_key).get(), nullptr, no_password, nullptr));
  const std::string public_key = key == nullptr ? "" : raw_public_key(key.get());
  std::array<unsigned char, kSignatureBytes> signature{};
  size_t size = signature.size();
  const Handle context = new_context();
  const bool done =
      !public_key.empty() &&
      crypto.sign_init(context.get(), nullptr, nullptr, nullptr, key.get()) == 1 &&
      crypto.sign(context.get(), signature.data(), &size, bytes_of(message), message.size()) == 1;
  crypto.clear_errors();
  if (!done) {
    throw std::invalid_argument(
        "is not an unencrypted Ed25519 private key in PEM; "
        "`openssl genpkey -algorithm ed25519 -out private.pem` makes one");
  }
  return {public_key, {signature.begin(), signature.end()}};
}

bool verify(const std::string& public_key, const std::string& signature,
            const std::string& message) {
  if (public_key.size() != kKeyBytes || signature.size() != kSignatureBytes) return false;
  const Crypto& crypto = Crypto::get();
  const Handle key =
      owned_key(crypto.new_public(kTypeEd25519, nullptr, bytes_of(public_key), public_key.size()));
  const Handle context = new_context();
  const bool fits = key != nullptr &&
                    crypto.verify_init(context.get(), nullptr, nullptr, nullptr, key.get()) == 1 &&
                    crypto.verify(context.get(), bytes_of(signature), signature.size(),
                                  bytes_of(message), message.size()) == 1;
  crypto.clear_errors();
  return fits;
}

std::vector<std::string> public_keys(const std::string& pem) {
  const Crypto& crypto = Crypto::get();
  std::vector<std::string> keys;
  const Handle bio = reader_of(pem);
  while (const Handle key =
             owned_key(crypto.read_public(bio.get(), nullptr, no_password, nullptr))) {
    keys.push_back(raw_public_key(key.get()));
    if (keys.back().empty()) break;
  }
  crypto.clear_errors();
  if (keys.empty() || keys.back().empty()) {
    throw std::invalid_argument(
        "does not hold Ed25519 public keys in PEM; "
        "`openssl pkey -in private.pem -pubout -out public.pem` writes one");
  }
  return keys;
}

}  // namespace neuron::ed25519
