#include "parallel/chunk_times.h"

namespace neuron::parallel {

ChunkTimes& ChunkTimes::get() {
  static auto& times = *new ChunkTimes();
  return times;
}

std::shared_ptr<runtime::TypicalDuration> ChunkTimes::of(const torch::jit::Module& model) {
  const Class of_model = model.type();
  MutexLock lock(mutex_);
  const auto known = of_class_.find(of_model);
  if (known != of_class_.end()) return known->second;
  std::erase_if(of_class_, [](const auto& entry) { return entry.first.expired(); });
  return of_class_.emplace(of_model, std::make_shared<runtime::TypicalDuration>()).first->second;
}

size_t ChunkTimes::size() const {
  MutexLock lock(mutex_);
  return of_class_.size();
}

}  // namespace neuron::parallel
