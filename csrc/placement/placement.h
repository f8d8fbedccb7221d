#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace neuron {

/// A wish for cores: where the first replica goes and how many there are; -1 is automatic.
struct Placement {
  int32_t start_nc = -1;
  int32_t nc_count = -1;

  bool operator==(const Placement&) const = default;
  int32_t count() const { return nc_count == -1 ? 1 : nc_count; }
};

/// "start_nc=0, nc_count=2".
std::string to_string(const Placement& placement);

/// @throws std::invalid_argument naming the value, the visible cores and the remedy, if `visible`
/// cores cannot meet the placement.
Placement make_placement(int64_t start_nc, int64_t nc_count, int32_t visible);

/// The first core of the contiguous window of `count` cores with the smallest sum of `loads`;
/// of several such windows the lowest. 1 <= count <= loads.size().
int32_t least_used_window(std::span<const int64_t> loads, int32_t count);

}  // namespace neuron
