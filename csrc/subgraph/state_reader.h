#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/message.h"
#include "subgraph/state.h"

namespace neuron::subgraph {

/// Whether a tensor is dense, on the CPU, and within its storage. One of a damaged file may claim a
/// view that its storage does not hold; nothing may look at the values of such a tensor.
bool lies_in_its_storage(const at::Tensor& tensor);

/// Reads the named fields of a state, with errors that name them.
class StateReader {
 public:
  explicit StateReader(const State& state) : state_(state) {}

  template <typename... Args>
  [[noreturn]] static void reject(const std::string& field, const Args&... why) {
    throw std::runtime_error(
        message("the saved subgraph is damaged or was not written by neuron_ext: "
                "field '",
                field, "' ", why...));
  }

  int64_t integer(const std::string& field, int64_t unset, int64_t least, int64_t most) const;
  bool flag(const std::string& field) const { return integer(field, 0, 0, 1) != 0; }
  std::string text(const std::string& field) const;
  std::string text_or_empty(const std::string& field) const;
  std::vector<int64_t> integers(const std::string& field) const;
  std::vector<std::string> texts(const std::string& field) const;

  /// One-dimensional contiguous uint8 on the CPU, or undefined where the field is absent.
  at::Tensor bytes(const std::string& field) const;

 private:
  const State& state_;
};

}  // namespace neuron::subgraph
