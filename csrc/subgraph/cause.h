#pragma once

#include <optional>
#include <string>
#include <utility>

namespace neuron::subgraph {

/// What went wrong in an op, as it was before TorchScript's interpreter made a std::runtime_error
/// with a traceback of it.
struct Cause {
  std::string text;
  bool callers_fault;  ///< std::invalid_argument
};

/// Notes the exception being handled as the calling thread's.
void note_cause() noexcept;

/// The calling thread's cause if `text`, what the interpreter made of it, tells of it. Forgets it.
std::optional<Cause> take_cause(const std::string& text);

/// Runs `work`; what it throws is noted and goes on.
template <typename Work>
auto noting_cause(Work&& work) {
  try {
    return std::forward<Work>(work)();
  } catch (...) {
    note_cause();
    throw;
  }
}

}  // namespace neuron::subgraph
