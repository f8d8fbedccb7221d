#pragma once

#include <string>

#include "subgraph/state.h"

namespace neuron::subgraph {

/// The field of the digest: a string.
constexpr char kDigestField[] = "sha256_state";

/// SHA-256 over the version and every field but the digest itself, in the order of their names, as
/// docs/state_format.md says. Of the tensors `code`, `weights` and `graph`, which have digests of
/// their own among the fields, only the length counts.
/// @throws std::runtime_error naming a tensor that is not dense, or claims more than its storage
/// holds.
std::string state_digest(const State& state);

/// The fields of a signature: strings.
constexpr char kSignatureField[] = "signature";
constexpr char kSignerField[] = "signer";

/// The same over what a signature vouches for: all but the digest, the signature, and what users
/// change of a module that they were given: its flags and its placement.
std::string signed_digest(const State& state);

}  // namespace neuron::subgraph
