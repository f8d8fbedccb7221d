#include "subgraph/cause.h"

#include <c10/util/Exception.h>

#include <stdexcept>

namespace neuron::subgraph {
namespace {

thread_local std::optional<Cause> last_cause;

}  // namespace

void note_cause() noexcept {
  try {
    try {
      throw;
    } catch (const std::invalid_argument& error) {
      last_cause = {error.what(), true};
    } catch (const c10::Error& error) {
      last_cause = {error.what_without_backtrace(), false};
    } catch (const std::exception& error) {
      last_cause = {error.what(), false};
    } catch (...) {
      last_cause.reset();
    }
  } catch (...) {  // no memory for the text
    last_cause.reset();
  }
}

std::optional<Cause> take_cause(const std::string& text) {
  std::optional<Cause> cause = std::exchange(last_cause, std::nullopt);
  if (cause && text.find(cause->text) == std::string::npos) cause.reset();
  return cause;
}

}  // namespace neuron::subgraph
