#include "subgraph/state_signature.h"

#include <string>

#include "common/log.h"
#include "common/message.h"
#include "subgraph/state_digest.h"

namespace neuron::subgraph {

using runtime::Executable;

namespace {

/// Hexadecimal digits.
std::string read_digits(const StateReader& reader, const std::string& name, size_t expected) {
  const std::string digits = reader.text(name);
  if (digits.size() != expected ||
      digits.find_first_not_of("0123456789abcdef") != std::string::npos) {
    StateReader::reject(name, "is not ", expected, " hexadecimal digits");
  }
  return digits;
}

}  // namespace

void read_signature(const State& state, const StateReader& reader, const Executable& executable) {
  const auto& strings = std::get<2>(state);
  if (!strings.contains(kSignatureField) && !strings.contains(kSignerField)) return;
  executable.signature->set({signed_digest(state), read_digits(reader, kSignerField, 64),
                             read_digits(reader, kSignatureField, 128)});
}

void write_signature(const Executable& executable, State& state) {
  const auto signature = executable.signature->get();
  if (!signature) return;
  if (signed_digest(state) != signature->digest) {
    log(LogLevel::kWarning, message("the signature of subgraph '", executable.name,
                                    "' is not saved: it covers more than this version knows"));
    return;
  }
  std::get<2>(state).insert(kSignerField, signature->signer);
  std::get<2>(state).insert(kSignatureField, signature->bytes);
}

}  // namespace neuron::subgraph
