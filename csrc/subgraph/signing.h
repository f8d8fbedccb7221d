#pragma once

#include <string>
#include <vector>

#include "subgraph/neuron_subgraph.h"

namespace neuron::subgraph {

/// Signs each of `subgraphs`; returns the public key as 64 hexadecimal digits.
/// @param private_key_file PEM.
/// @throws std::invalid_argument naming the file if it cannot be read or is no such key. Nothing is
/// signed then.
std::string sign(const std::vector<SubgraphHandle>& subgraphs, const std::string& private_key_file);

/// Returns if each of `subgraphs` is signed by one of the keys, and its contents are what was
/// signed. Loads and runs nothing.
/// @param public_keys_file PEM, one key or several.
/// @throws std::invalid_argument for the file as above; std::runtime_error naming the first
/// subgraph that is not signed so, and why.
void verify(const std::vector<SubgraphHandle>& subgraphs, const std::string& public_keys_file);

}  // namespace neuron::subgraph
