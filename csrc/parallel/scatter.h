#pragma once

#include <ATen/core/ivalue.h>

#include <cstdint>
#include <string>
#include <vector>

namespace neuron::parallel {

/// The arguments of a call, to be cut along one dimension into the arguments of chunks.
///
/// Tensors are cut, at any depth of tuples, named tuples, lists and dicts. Those of rank 0 and all
/// that is no tensor go to every chunk as they are.
class Scatter {
 public:
  /// @param names of the arguments, for messages.
  /// @param dim negative counts from the last.
  /// @throws std::invalid_argument for a tensor that has no dimension `dim`, or another size there
  /// than the first: which one.
  Scatter(std::vector<c10::IValue> arguments, const std::vector<std::string>& names, int64_t dim);

  /// The size of `dim`; -1 if there is no tensor to cut.
  int64_t rows() const { return rows_; }

  /// The arguments for rows begin .. end-1. The tensors are views, but where `padded_rows` is more:
  /// then the last row is repeated,
  /// or zeros where there is none.
  std::vector<c10::IValue> chunk(int64_t begin, int64_t end, int64_t padded_rows) const;

 private:
  void measure(const c10::IValue& value, const std::string& path);

  const std::vector<c10::IValue> arguments_;
  const int64_t dim_;
  int64_t rows_ = -1;
  std::string first_;  ///< the tensor that gave rows_
};

/// One value out of those of all chunks: tensors one after another along `dim`, those of rank 0
/// as one vector; containers item by item; anything else is the same in each chunk.
/// @param rows of each chunk; where its outputs have `padded_rows`, the rest is left out.
/// @throws std::runtime_error where the values of two chunks do not go together.
c10::IValue gather(const std::vector<c10::IValue>& values, int64_t dim,
                   const std::vector<int64_t>& rows, int64_t padded_rows);

}  // namespace neuron::parallel
