// Ed25519 with the examples of RFC 8032, section 7.1.
#include "common/ed25519.h"

#include <gtest/gtest.h>

#include <stdexcept>

namespace neuron::ed25519 {
namespace {

std::string bytes(const std::string& digits) {
  std::string all;
  for (size_t i = 0; i < digits.size(); i += 2) {
    all += static_cast<char>(std::stoi(digits.substr(i, 2), nullptr, 16));
  }
  return all;
}

struct Example {
  std::string private_pem, public_pem, public_key, message, signature;
};

const Example kExamples[] = {
    {"-----BEGIN PRIVATE KEY-----\n"
     "MC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g\n"
     "-----END PRIVATE KEY-----\n",
     "-----BEGIN PUBLIC KEY-----\n"
     "MCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=\n"
     "-----END PUBLIC KEY-----\n",
     bytes("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"), "",
     bytes("e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39"
           "701cf9b46bd25bf5f0595bbe24655141438e7a100b")},
    {"-----BEGIN PRIVATE KEY-----\n"
     "MC4CAQAwBQYDK2VwBCIEIEzNCJso/5banbbDRuwRTg9bijGfNaumJNqM9u1PuKb7\n"
     "-----END PRIVATE KEY-----\n",
     "-----BEGIN PUBLIC KEY-----\n"
     "MCowBQYDK2VwAyEAPUAXw+hDiVqStwqnTRt+vJyYLM8uxJaMwM1V8Sr0Zgw=\n"
     "-----END PUBLIC KEY-----\n",
     bytes("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"), "\x72",
     bytes("92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f36"
           "13d0f11d8c387b2eaeb4302aeeb00d291612bb0c00")},
};

TEST(Ed25519, SignsAsTheStandardDoes) {
  for (const auto& example : kExamples) {
    const auto made = sign(example.private_pem, example.message);
    EXPECT_EQ(made.public_key, example.public_key);
    EXPECT_EQ(made.signature, example.signature);
  }
}

TEST(Ed25519, VerifiesNothingButWhatWasSigned) {
  for (const auto& [private_pem, public_pem, key, text, signature] : kExamples) {
    EXPECT_TRUE(verify(key, signature, text));
    EXPECT_FALSE(verify(key, signature, text + "x"));
    EXPECT_FALSE(verify(key.substr(1), signature, text));
    EXPECT_FALSE(verify(key, signature.substr(1), text));
    EXPECT_FALSE(verify("", "", text));
    for (const size_t position : {0U, 31U, 32U, 63U}) {
      std::string other = signature;
      other[position] = static_cast<char>(other[position] ^ 1);
      EXPECT_FALSE(verify(key, other, text));
    }
  }
  EXPECT_FALSE(verify(kExamples[1].public_key, kExamples[0].signature, ""));
}

TEST(Ed25519, ReadsKeysOneAfterAnother) {
  const auto& [first, second] = kExamples;
  EXPECT_EQ(public_keys(first.public_pem), std::vector<std::string>{first.public_key});
  EXPECT_EQ(public_keys("text\n" + second.public_pem + "\n" + first.public_pem),
            (std::vector<std::string>{second.public_key, first.public_key}));
  EXPECT_THROW(public_keys(""), std::invalid_argument);
  EXPECT_THROW(public_keys(first.private_pem), std::invalid_argument);
  EXPECT_THROW(sign(first.public_pem, ""), std::invalid_argument);
  EXPECT_THROW(sign("", ""), std::invalid_argument);
}

}  // namespace
}  // namespace neuron::ed25519
