#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace neuron::fuzz {

/// Chance that can be repeated: the same seed and input number throw the same numbers.
class Dice {
 public:
  Dice(uint64_t seed, uint64_t input) : engine_(seed * 0x9e3779b97f4a7c15U + input) {}

  /// From 0 to `end` - 1; 0 if there is nothing to choose from.
  size_t below(size_t end) { return end == 0 ? 0 : static_cast<size_t>(engine_() % end); }
  bool one_in(size_t chances) { return below(chances) == 0; }
  uint8_t byte() { return static_cast<uint8_t>(engine_()); }

  template <typename Value>
  const Value& of(const std::vector<Value>& values) {
    return values[below(values.size())];
  }

  /// Numbers that have broken readers before, and some that are near what stands in files.
  int64_t number();

 private:
  std::mt19937_64 engine_;
};

inline int64_t Dice::number() {
  static const std::vector<int64_t> kHard = {
      0,
      1,
      -1,
      2,
      3,
      4,
      7,
      8,
      12,
      63,
      64,
      65,
      255,
      256,
      INT32_MAX,
      int64_t{INT32_MAX} + 1,
      INT32_MIN,
      UINT32_MAX,
      int64_t{1} << 40,
      int64_t{1} << 47,
      (int64_t{1} << 48) - 1,
      int64_t{1} << 48,
      (int64_t{1} << 48) + 1,
      int64_t{1} << 61,
      int64_t{1} << 62,
      INT64_MAX,
      INT64_MAX - 1,
      INT64_MIN,
      INT64_MIN + 1,
      0x7ff8000000000000,  // the bits of a NaN
  };
  switch (below(4)) {
    case 0:
      return static_cast<int64_t>(below(300));
    case 1:
      return static_cast<int64_t>(engine_());
    default:
      return of(kHard);
  }
}

}  // namespace neuron::fuzz
