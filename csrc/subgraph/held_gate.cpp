#include "subgraph/held_gate.h"

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <utility>

namespace neuron::subgraph {
namespace {

thread_local const GateScope* innermost = nullptr;

}  // namespace

bool HeldGate::admits(Mode mode) const {
  return !writing_ && (mode == Mode::kShared || readers_ == 0);
}

void HeldGate::admit(Mode mode) {
  if (mode == Mode::kExclusive) {
    writing_ = true;
  } else {
    ++readers_;
  }
}

void HeldGate::enter(Mode mode) {
  MutexLock lock(mutex_);
  if (queue_.empty() && admits(mode)) {
    admit(mode);
    return;
  }
  Waiter waiter{mode};
  queue_.push_back(&waiter);
  while (!waiter.admitted) waiter.turn.wait(mutex_);
}

void HeldGate::leave(Mode mode) {
  MutexLock lock(mutex_);
  if (mode == Mode::kExclusive) {
    writing_ = false;
  } else {
    --readers_;
  }
  while (!queue_.empty() && admits(queue_.front()->mode)) {
    Waiter* const next = queue_.front();
    queue_.pop_front();
    admit(next->mode);
    next->admitted = true;
    // Under the lock: the waiter is gone as soon as it may go on.
    next->turn.notify_one();
  }
}

size_t HeldGate::waiting() const {
  MutexLock lock(mutex_);
  return queue_.size();
}

bool GateScope::held(const GateWish& wish) {
  for (const GateScope* scope = innermost; scope != nullptr; scope = scope->outer_) {
    for (const GateWish& taken : scope->taken_) {
      if (taken.gate != wish.gate) continue;
      if (taken.mode == HeldGate::Mode::kShared && wish.mode == HeldGate::Mode::kExclusive) {
        throw std::logic_error(
            "weights or state would be written inside a request that reads them");
      }
      return true;
    }
  }
  return false;
}

GateScope::GateScope(std::vector<GateWish> wishes) : outer_(innermost) {
  // By address, and the exclusive wish for a gate before shared ones for the same.
  std::sort(wishes.begin(), wishes.end(), [](const GateWish& one, const GateWish& other) {
    if (one.gate != other.gate) return std::less<>()(one.gate.get(), other.gate.get());
    return one.mode == HeldGate::Mode::kExclusive && other.mode == HeldGate::Mode::kShared;
  });
  std::erase_if(wishes, held);
  taken_.reserve(wishes.size());
  try {
    for (GateWish& wish : wishes) {
      if (!taken_.empty() && taken_.back().gate == wish.gate) continue;
      wish.gate->enter(wish.mode);
      taken_.push_back(std::move(wish));
    }
  } catch (...) {
    leave_all();
    throw;
  }
  innermost = this;
}

GateScope::~GateScope() {
  innermost = outer_;
  leave_all();
}

void GateScope::leave_all() noexcept {
  for (auto taken = taken_.rbegin(); taken != taken_.rend(); ++taken) {
    taken->gate->leave(taken->mode);
  }
}

const GateScope* GateScope::current() {
  return innermost;
}

GateAdoption::GateAdoption(const GateScope* scope) : before_(innermost) {
  if (scope != nullptr) innermost = scope;
}

GateAdoption::~GateAdoption() {
  innermost = before_;
}

}  // namespace neuron::subgraph
