#include "runtime/host/integrity.h"

#include <stdexcept>
#include <string>

#include "common/message.h"
#include "common/sha256.h"
#include "runtime/quick_checksum.h"
#include "runtime/settings.h"

namespace neuron::runtime::host {
namespace {

[[noreturn]] void reject(const Executable& executable, const char* what) {
  throw std::runtime_error(
      message("the ", what, " of subgraph '", executable.name,
              "' is damaged: its bytes do not have the digest saved with them; "
              "get the file again, or trace again"));
}

void check_sha256(const Executable& executable, const char* what, const at::Tensor& bytes,
                  const std::string& expected) {
  if (sha256_hex(bytes.const_data_ptr(), static_cast<size_t>(bytes.numel())) != expected) {
    reject(executable, what);
  }
}

void check_data(const Executable& executable, const char* what, const at::Tensor& bytes,
                const std::string& expected_sha256, int64_t expected_checksum) {
  if (!bytes.defined()) return;
  if (quick_checksum(bytes) != expected_checksum) reject(executable, what);
  if (validate_hash()) check_sha256(executable, what, bytes, expected_sha256);
}

}  // namespace

void check_integrity(const Executable& executable, Format format) {
  if (format == Format::kTorchScript) {
    check_data(executable, "portable graph", executable.graph, executable.graph_sha256,
               executable.graph_checksum);
    return;
  }
  // Flipped bits in code do not give wrong numbers but anything at all.
  check_sha256(executable, "native code", executable.code, executable.code_sha256);
  check_data(executable, "weights", executable.weights, executable.weights_sha256,
             executable.weights_checksum);
}

}  // namespace neuron::runtime::host
