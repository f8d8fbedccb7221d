#pragma once

#include <ATen/core/Dict.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <tuple>

#include "placement/placement.h"
#include "runtime/executable.h"

namespace neuron::subgraph {

/// What the user wished for a subgraph; saved with it.
struct Wishes {
  bool lazy_load = false;
  bool async_load = false;
  bool dynamic_batch = false;
  Placement placement{};
};

/// What `__getstate__` gives and `__setstate__` takes; docs/state_format.md describes it. The
/// version comes first and is judged before anything else is read; the bags have named, typed
/// fields, of which readers ignore those they do not know.
using State = std::tuple<int64_t,                                         // version
                         c10::Dict<std::string, int64_t>,                 // ints
                         c10::Dict<std::string, std::string>,             // strings
                         c10::Dict<std::string, c10::List<int64_t>>,      // int lists
                         c10::Dict<std::string, c10::List<std::string>>,  // string lists
                         c10::Dict<std::string, at::Tensor>>;             // tensors

constexpr int64_t kStateVersion = 1;

struct Decoded {
  std::shared_ptr<const runtime::Executable> executable;
  Wishes wishes;
};

/// Where a state comes from. A file's must carry the digest of all its fields, so that no changed
/// byte goes unnoticed; a fresh trace has none yet.
enum class Origin { kFile, kTrace };

/// @throws std::runtime_error naming the field that is bad, what it holds and what it should.
/// Maps and runs nothing.
Decoded decode(const State& state, Origin origin);

/// The tensors are shared with `executable`, not copied.
State encode(const runtime::Executable& executable, const Wishes& wishes);

/// "float32".
const std::string& dtype_name(at::ScalarType dtype);

}  // namespace neuron::subgraph
