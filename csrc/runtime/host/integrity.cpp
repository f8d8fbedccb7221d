#include "runtime/host/integrity.h"

#include <stdexcept>

#include "common/message.h"
#include "runtime/settings.h"

namespace neuron::runtime::host {
namespace {

void check(const Executable& executable, const char* what, const ContentPtr& content,
           Content::Check check) {
  if (content == nullptr) return;
  // A signature covers the SHA-256 of the bytes, and no other checksum.
  const bool thorough = validate_hash() || native_code_policy() == NativeCode::kSigned;
  if (content->verify(thorough ? Content::Check::kFull : check, thorough)) return;
  throw std::runtime_error(
      message("the ", what, " of subgraph '", executable.name,
              "' is damaged: its bytes do not have the digest saved with them; "
              "get the file again, or trace again"));
}

}  // namespace

void check_integrity(const Executable& executable, Format format) {
  if (format == Format::kTorchScript) {
    check(executable, "portable graph", executable.graph, Content::Check::kQuick);
    return;
  }
  // Flipped bits in code do not give wrong numbers but anything at all.
  check(executable, "native code", executable.code, Content::Check::kFull);
  check(executable, "weights", executable.weights, Content::Check::kQuick);
}

}  // namespace neuron::runtime::host
