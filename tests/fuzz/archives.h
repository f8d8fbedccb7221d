#pragma once

#include <string>
#include <vector>

#include "dice.h"
#include "subgraph/state.h"

namespace neuron::fuzz {

/// One file in a ScriptModule's archive.
struct Record {
  std::string name;
  std::string data;     ///< as it stands in the archive
  size_t offset = 0;    ///< of the data in the archive that it was read from
  uint16_t method = 0;  ///< of compression; 0 is none
  size_t inflated = 0;  ///< the size that the data is said to have without compression
};

/// The records of an archive as PyTorch writes it, with nothing broken.
std::vector<Record> records_of(const std::string& archive);

/// An archive of `records`, without checksums, which PyTorch's reader ignores.
std::string archive_of(const std::vector<Record>& records);

/// A module that calls a subgraph with `state`, as `torch.jit.save` would write it if a subgraph
/// could have it.
std::string archive_with(const subgraph::State& state);

/// `archive` with flipped, removed, inserted, repeated or cut off bytes, or with records dropped,
/// repeated, renamed, swapped, cut or put in from `other`.
std::string mutated(const std::string& archive, const std::string& other, Dice& dice);

}  // namespace neuron::fuzz
