#include "subgraph/state.h"

#include <ATen/ops/from_blob.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "runtime/quick_checksum.h"
#include "subgraph/state_digest.h"
#include "subgraph/state_held.h"
#include "subgraph/state_reader.h"
#include "subgraph/state_signature.h"

namespace neuron::subgraph {
namespace {

using runtime::ConstantSpec;
using runtime::Executable;
using runtime::Format;
using runtime::TensorSpec;

constexpr int64_t kMaxRank = 64;
constexpr int64_t kMaxBytes = int64_t{1} << 48;

at::ScalarType parse_dtype(const std::string& field, const std::string& name) {
  const auto& known = c10::getStringToDtypeMap();
  const auto found = known.find(name);
  if (found == known.end()) StateReader::reject(field, "names no dtype: '", name, "'");
  return found->second;
}

void check_length(const std::string& field, size_t length, size_t expected) {
  if (length != expected) {
    StateReader::reject(field, "has ", length, " entries, expected ", expected);
  }
}

/// Cuts a list of all shapes, one after another, into one per rank.
std::vector<std::vector<int64_t>> split_by_rank(const std::string& field,
                                                const std::vector<int64_t>& joined,
                                                const std::vector<int64_t>& ranks) {
  std::vector<std::vector<int64_t>> parts;
  size_t at = 0;
  for (const int64_t rank : ranks) {
    if (rank < 0 || rank > kMaxRank || at + static_cast<size_t>(rank) > joined.size()) {
      StateReader::reject(field, "does not fit the ranks that go with it");
    }
    parts.emplace_back(joined.begin() + static_cast<std::ptrdiff_t>(at),
                       joined.begin() + static_cast<std::ptrdiff_t>(at) + rank);
    at += static_cast<size_t>(rank);
    for (const int64_t size : parts.back()) {
      if (size < 0) StateReader::reject(field, "holds ", size, ", expected 0 or more");
    }
  }
  if (at != joined.size()) StateReader::reject(field, "does not fit the ranks that go with it");
  return parts;
}

/// The bytes from the first element to the last, or more than kMaxBytes where that would overflow.
int64_t extent(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
               size_t item_size) {
  __int128 elements = 1;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] == 0) return 0;
    elements += static_cast<__int128>(shape[i] - 1) * strides[i];
    if (elements > kMaxBytes) return std::numeric_limits<int64_t>::max();
  }
  return static_cast<int64_t>(elements * static_cast<__int128>(item_size));
}

std::vector<TensorSpec> read_specs(const StateReader& reader, const std::string& kind) {
  const std::string dtypes_field = kind + "_dtypes";
  const auto dtypes = reader.texts(dtypes_field);
  const auto ranks = reader.integers(kind + "_ranks");
  check_length(kind + "_ranks", ranks.size(), dtypes.size());
  const auto shapes = split_by_rank(kind + "_shapes", reader.integers(kind + "_shapes"), ranks);
  const auto names = reader.texts(kind + "_names");
  if (kind == "input" || !names.empty()) {
    check_length(kind + "_names", names.size(), dtypes.size());
  }
  std::vector<TensorSpec> specs;
  for (size_t i = 0; i < dtypes.size(); ++i) {
    TensorSpec spec{i < names.size() ? names[i] : "", parse_dtype(dtypes_field, dtypes[i]),
                    shapes[i]};
    // A dense row-major tensor: its strides are products of its sizes.
    std::vector<int64_t> strides(spec.shape.size());
    int64_t stride = 1;
    for (size_t d = spec.shape.size(); d-- > 0;) {
      strides[d] = stride;
      if (spec.shape[d] > 0 && stride > kMaxBytes / spec.shape[d]) {
        StateReader::reject(kind + "_shapes", "is too large");
      }
      stride *= std::max<int64_t>(spec.shape[d], 1);
    }
    if (extent(spec.shape, strides, c10::elementSize(spec.dtype)) > kMaxBytes) {
      StateReader::reject(kind + "_shapes", "is too large");
    }
    specs.push_back(std::move(spec));
  }
  return specs;
}

at::Layout parse_layout(const std::string& name) {
  if (name == "strided") return at::kStrided;
  if (name == "mkldnn") return at::kMkldnn;
  StateReader::reject("constant_layouts", "names no layout: '", name, "'");
}

std::vector<ConstantSpec> read_constants(const StateReader& reader, const at::Tensor& weights) {
  const auto names = reader.texts("constant_names");
  const size_t count = names.size();
  const auto fqns = reader.texts("constant_fqns");
  const auto dtypes = reader.texts("constant_dtypes");
  const auto layouts = reader.texts("constant_layouts");
  const auto offsets = reader.integers("constant_offsets");
  const auto sizes = reader.integers("constant_sizes");
  const auto ranks = reader.integers("constant_ranks");
  const auto opaque_sizes = reader.integers("constant_opaque_sizes");
  check_length("constant_fqns", fqns.size(), count);
  check_length("constant_dtypes", dtypes.size(), count);
  check_length("constant_layouts", layouts.size(), count);
  check_length("constant_offsets", offsets.size(), count);
  check_length("constant_sizes", sizes.size(), count);
  check_length("constant_ranks", ranks.size(), count);
  check_length("constant_opaque_sizes", opaque_sizes.size(), count);
  const auto shapes = split_by_rank("constant_shapes", reader.integers("constant_shapes"), ranks);
  const auto strides =
      split_by_rank("constant_strides", reader.integers("constant_strides"), ranks);
  const at::Tensor opaque = reader.bytes("constants_opaque");
  const int64_t opaque_length = opaque.defined() ? opaque.numel() : 0;
  const int64_t weights_length = weights.defined() ? weights.numel() : 0;

  std::vector<ConstantSpec> constants;
  int64_t opaque_at = 0;
  for (size_t i = 0; i < count; ++i) {
    ConstantSpec constant{names[i],
                          fqns[i],
                          parse_dtype("constant_dtypes", dtypes[i]),
                          parse_layout(layouts[i]),
                          offsets[i],
                          sizes[i],
                          shapes[i],
                          strides[i],
                          {}};
    if (constant.offset < 0 || constant.size < 0 || constant.offset > weights_length ||
        constant.size > weights_length - constant.offset) {
      StateReader::reject("constant_offsets", "puts constant '", constant.name, "' at ",
                          constant.offset, "+", constant.size, ", outside the weights of ",
                          weights_length, " bytes");
    }
    if (constant.layout == at::kStrided &&
        extent(constant.shape, constant.strides, c10::elementSize(constant.dtype)) >
            constant.size) {
      StateReader::reject("constant_shapes", "makes constant '", constant.name,
                          "' larger than its ", constant.size, " bytes");
    }
    if (opaque_sizes[i] < 0 || opaque_sizes[i] > opaque_length - opaque_at) {
      StateReader::reject("constant_opaque_sizes", "does not fit the ", opaque_length,
                          " bytes of constants_opaque");
    }
    if (opaque_sizes[i] > 0) {
      const auto* data = static_cast<const uint8_t*>(opaque.const_data_ptr()) + opaque_at;
      constant.opaque.assign(data, data + opaque_sizes[i]);
      opaque_at += opaque_sizes[i];
    }
    constants.push_back(std::move(constant));
  }
  if (opaque_at != opaque_length) {
    StateReader::reject("constant_opaque_sizes", "does not fit the ", opaque_length,
                        " bytes of constants_opaque");
  }
  return constants;
}

Format parse_format(const std::string& name) {
  for (const Format format : {Format::kInductor, Format::kTorchScript, Format::kNeff}) {
    if (name == to_string(format)) return format;
  }
  StateReader::reject("format", "is '", name, "', expected inductor, torchscript or neff");
}

void check_version(int64_t version) {
  if (version > kStateVersion) {
    throw std::runtime_error(message("this module was saved with subgraph state version ", version,
                                     ", and this neuron_ext reads versions up to ", kStateVersion,
                                     ": install a newer neuron_ext"));
  }
  if (version < 1) {
    StateReader::reject("version", "is ", version, ", expected 1 to ", kStateVersion);
  }
}

/// The bytes of the field `name` with the digests that stand beside them; null if there are none.
/// A fresh trace has no checksum yet: it is computed.
runtime::ContentPtr read_content(const State& state, const StateReader& reader,
                                 const std::string& name) {
  const at::Tensor bytes = reader.bytes(name);
  if (!bytes.defined()) return nullptr;
  std::optional<int64_t> checksum;
  if (name != "code") {
    const auto& ints = std::get<1>(state);
    const auto found = ints.find("checksum_" + name);
    checksum = found != ints.end() ? found->value() : runtime::quick_checksum(bytes);
  }
  return std::make_shared<runtime::Content>(bytes, reader.text_or_empty("sha256_" + name),
                                            checksum);
}

}  // namespace

const std::string& dtype_name(at::ScalarType dtype) {
  static const auto& names = *new auto([] {
    std::vector<std::string> all;
    for (int8_t i = 0; i < static_cast<int8_t>(at::ScalarType::NumOptions); ++i) {
      const auto type = static_cast<at::ScalarType>(i);
      all.emplace_back(type == at::ScalarType::Undefined ? "undefined"
                                                         : c10::getDtypeNames(type).first);
    }
    return all;
  }());
  return names.at(static_cast<size_t>(dtype));
}

Decoded decode(const State& state, Origin origin) {
  check_version(std::get<0>(state));
  const StateReader reader(state);

  Decoded decoded;
  constexpr int64_t kMostCores = std::numeric_limits<int32_t>::max();
  decoded.wishes.lazy_load = reader.flag("lazy_load");
  decoded.wishes.async_load = reader.flag("async_load");
  decoded.wishes.dynamic_batch = reader.flag("dynamic_batch");
  decoded.wishes.placement.start_nc =
      static_cast<int32_t>(reader.integer("start_nc", -1, -1, kMostCores));
  decoded.wishes.placement.nc_count =
      static_cast<int32_t>(reader.integer("nc_count", -1, -1, kMostCores));
  if (decoded.wishes.placement.nc_count == 0) StateReader::reject("nc_count", "is 0");

  auto executable = std::make_shared<Executable>();
  executable->name = reader.text("name");
  executable->format = parse_format(reader.text("format"));
  executable->inputs = read_specs(reader, "input");
  executable->outputs = read_specs(reader, "output");
  executable->mutated_inputs = reader.integers("mutated_inputs");
  for (const int64_t index : executable->mutated_inputs) {
    if (index < 0 || index >= static_cast<int64_t>(executable->inputs.size())) {
      StateReader::reject("mutated_inputs", "names input ", index, " of ",
                          executable->inputs.size());
    }
  }
  read_held(reader, *executable);
  executable->requirements = {reader.text_or_empty("arch"), reader.texts("cpu_features"),
                              reader.text_or_empty("torch_version"),
                              reader.text_or_empty("runtime")};
  executable->producer = reader.text_or_empty("producer");
  executable->constants = read_constants(reader, reader.bytes("weights"));
  executable->code = read_content(state, reader, "code");
  executable->weights = read_content(state, reader, "weights");
  executable->graph = read_content(state, reader, "graph");
  if (executable->format == Format::kInductor) {
    if (executable->code == nullptr) StateReader::reject("code", "is missing");
    reader.text("arch");
    reader.text("torch_version");
  }
  if (executable->format == Format::kTorchScript && executable->graph == nullptr) {
    StateReader::reject("graph", "is missing");
  }
  // Last, so that a field that is bad in itself is named.
  if (origin == Origin::kFile && reader.text(kDigestField) != state_digest(state)) {
    StateReader::reject(kDigestField,
                        "is not the digest of the other fields: some of them changed");
  }
  read_signature(state, reader, *executable);
  decoded.executable = std::move(executable);
  return decoded;
}

State encode(const Executable& executable, const Wishes& wishes) {
  State state;
  auto& [version, ints, strings, int_lists, string_lists, tensors] = state;
  version = kStateVersion;
  ints.insert("lazy_load", wishes.lazy_load);
  ints.insert("async_load", wishes.async_load);
  ints.insert("dynamic_batch", wishes.dynamic_batch);
  ints.insert("start_nc", wishes.placement.start_nc);
  ints.insert("nc_count", wishes.placement.nc_count);
  strings.insert("name", executable.name);
  strings.insert("format", to_string(executable.format));
  strings.insert("producer", executable.producer);
  strings.insert("runtime", executable.requirements.runtime);
  strings.insert("arch", executable.requirements.arch);
  strings.insert("torch_version", executable.requirements.torch_version);
  string_lists.insert("cpu_features", c10::List<std::string>(executable.requirements.cpu_features));

  const auto write_specs = [&](const std::string& kind, const std::vector<TensorSpec>& specs) {
    c10::List<std::string> names, dtypes;
    c10::List<int64_t> ranks, shapes;
    for (const auto& spec : specs) {
      names.push_back(spec.name);
      dtypes.push_back(dtype_name(spec.dtype));
      ranks.push_back(static_cast<int64_t>(spec.shape.size()));
      for (const int64_t size : spec.shape) shapes.push_back(size);
    }
    string_lists.insert(kind + "_names", names);
    string_lists.insert(kind + "_dtypes", dtypes);
    int_lists.insert(kind + "_ranks", ranks);
    int_lists.insert(kind + "_shapes", shapes);
  };
  write_specs("input", executable.inputs);
  write_specs("output", executable.outputs);
  int_lists.insert("mutated_inputs", c10::List<int64_t>(executable.mutated_inputs));
  write_held(executable, state);

  c10::List<std::string> names, fqns, dtypes, layouts;
  c10::List<int64_t> offsets, sizes, ranks, shapes, strides, opaque_sizes;
  std::vector<uint8_t> opaque;
  for (const auto& constant : executable.constants) {
    names.push_back(constant.name);
    fqns.push_back(constant.fqn);
    dtypes.push_back(dtype_name(constant.dtype));
    layouts.push_back(constant.layout == at::kStrided ? "strided" : "mkldnn");
    offsets.push_back(constant.offset);
    sizes.push_back(constant.size);
    ranks.push_back(static_cast<int64_t>(constant.shape.size()));
    for (const int64_t size : constant.shape) shapes.push_back(size);
    for (const int64_t stride : constant.strides) strides.push_back(stride);
    opaque_sizes.push_back(static_cast<int64_t>(constant.opaque.size()));
    opaque.insert(opaque.end(), constant.opaque.begin(), constant.opaque.end());
  }
  string_lists.insert("constant_names", names);
  string_lists.insert("constant_fqns", fqns);
  string_lists.insert("constant_dtypes", dtypes);
  string_lists.insert("constant_layouts", layouts);
  int_lists.insert("constant_offsets", offsets);
  int_lists.insert("constant_sizes", sizes);
  int_lists.insert("constant_ranks", ranks);
  int_lists.insert("constant_shapes", shapes);
  int_lists.insert("constant_strides", strides);
  int_lists.insert("constant_opaque_sizes", opaque_sizes);
  if (!opaque.empty()) {
    tensors.insert(
        "constants_opaque",
        at::from_blob(opaque.data(), {static_cast<int64_t>(opaque.size())}, at::kByte).clone());
  }

  const auto write_content = [&](const std::string& name, const runtime::ContentPtr& content) {
    if (content == nullptr) return;
    tensors.insert(name, content->bytes());
    strings.insert("sha256_" + name, content->sha256());
    if (content->checksum()) ints.insert("checksum_" + name, *content->checksum());
  };
  write_content("code", executable.code);
  write_content("weights", executable.weights);
  write_content("graph", executable.graph);
  write_signature(executable, state);
  strings.insert(kDigestField, state_digest(state));
  return state;
}

}  // namespace neuron::subgraph
