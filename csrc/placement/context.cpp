#include "placement/context.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

namespace neuron {
namespace {

struct Context {
  int64_t token;
  Placement placement;
};

struct ContextStack {
  std::vector<Context> contexts;
  int64_t next_token = 1;
};

thread_local ContextStack stack;

}  // namespace

int64_t enter_placement_context(Placement placement) {
  stack.contexts.push_back({stack.next_token, placement});
  return stack.next_token++;
}

void exit_placement_context(int64_t token) {
  auto& contexts = stack.contexts;
  const auto found =
      std::find_if(contexts.begin(), contexts.end(), [&](auto& c) { return c.token == token; });
  if (found == contexts.end()) {
    throw std::invalid_argument(
        "this placement context is not open on this thread: leave a context on the thread that "
        "entered it");
  }
  // Only this one: contexts held by generators or coroutines may close out of order.
  contexts.erase(found);
}

std::optional<Placement> current_placement_context() {
  if (stack.contexts.empty()) return std::nullopt;
  return stack.contexts.back().placement;
}

}  // namespace neuron
