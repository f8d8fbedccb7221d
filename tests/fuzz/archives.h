#pragma once

#include <string>
#include <vector>

#include "dice.h"
#include "subgraph/state.h"

namespace neuron::fuzz {

/// One file in a ScriptModule's archive.
struct Record {
  std::string name;
  std::string data;
  size_t offset = 0;  ///< of the data in the archive that it was read from
};

/// The records of an archive as PyTorch writes them: none compressed, nothing broken.
std::vector<Record> records_of(const std::string& archive);

/// An archive of `records`, without compression and checksums, which PyTorch's reader ignores.
std::string archive_of(const std::vector<Record>& records);

/// A module that calls a subgraph with `state`, as `torch.jit.save` would write it if a subgraph
/// could have it.
std::string archive_with(const subgraph::State& state);

/// `archive` with flipped, removed, inserted, repeated or cut off bytes, or with records dropped,
/// repeated, renamed, swapped, cut or put in from `other`.
std::string mutated(const std::string& archive, const std::string& other, Dice& dice);

}  // namespace neuron::fuzz
