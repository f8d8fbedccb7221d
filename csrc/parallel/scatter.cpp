#include "parallel/scatter.h"

#include <ATen/core/Dict.h>
#include <ATen/core/List.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <stdexcept>
#include <utility>

#include "common/message.h"

namespace neuron::parallel {
namespace {

using c10::IValue;

int64_t wrapped(int64_t dim, const at::Tensor& tensor) {
  return dim < 0 ? dim + tensor.dim() : dim;
}

/// A value of the same type with each tensor in it replaced by what `change` makes of it.
template <typename Change>
IValue mapped(const IValue& value, const Change& change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTuple()) {
    const auto& tuple = value.toTupleRef();
    std::vector<IValue> items;
    for (const auto& item : tuple.elements()) items.push_back(mapped(item, change));
    return c10::ivalue::Tuple::createNamed(std::move(items), tuple.type());
  }
  if (value.isTensorList() || value.isList()) {
    const auto list = value.toList();
    c10::impl::GenericList items(list.elementType());
    items.reserve(list.size());
    for (const IValue& item : value.toListRef()) items.push_back(mapped(item, change));
    return items;
  }
  if (value.isGenericDict()) {
    const auto dict = value.toGenericDict();
    c10::impl::GenericDict items(dict.keyType(), dict.valueType());
    for (const auto& entry : dict) items.insert(entry.key(), mapped(entry.value(), change));
    return items;
  }
  return value;
}

/// A dict's key as Python writes it.
std::string shown(const IValue& key) {
  return key.isString() ? message("'", key.toStringRef(), "'") : message(key);
}

at::Tensor padded(const at::Tensor& rows, int64_t dim, int64_t size) {
  std::vector<int64_t> missing = rows.sizes().vec();
  missing[dim] = size - rows.size(dim);
  if (rows.size(dim) == 0) return at::zeros(missing, rows.options());
  return at::cat({rows, rows.narrow(dim, rows.size(dim) - 1, 1).expand(missing)}, dim);
}

[[noreturn]] void refuse_chunks(const std::string& why) {
  throw std::runtime_error(message("the outputs of the chunks cannot be joined: ", why,
                                   "; call the module itself for such batches"));
}

/// What belongs together of all chunks: `pick` takes it out of one.
template <typename Pick>
std::vector<IValue> each(const std::vector<IValue>& values, const Pick& pick) {
  std::vector<IValue> parts;
  parts.reserve(values.size());
  for (const auto& value : values) parts.push_back(pick(value));
  return parts;
}

template <typename Count>
void check_counts(const std::vector<IValue>& values, const char* kind, const Count& count) {
  for (const auto& value : values) {
    if (count(value) == count(values[0])) continue;
    refuse_chunks(message("one gives a ", kind, " of ", count(values[0]), " items and another of ",
                          count(value)));
  }
}

at::Tensor join_tensors(const std::vector<IValue>& values, int64_t dim,
                        const std::vector<int64_t>& rows, int64_t padded_rows) {
  std::vector<at::Tensor> parts;
  for (size_t i = 0; i < values.size(); ++i) {
    at::Tensor part = values[i].toTensor();
    const int64_t at = wrapped(dim, part);
    if (part.dim() > 0 && (at < 0 || at >= part.dim())) {
      refuse_chunks(
          message("an output of shape [", join(part.sizes()), "] has no dimension ", dim));
    }
    if (part.dim() > 0 && rows[i] < padded_rows && part.size(at) == padded_rows) {
      part = part.narrow(at, 0, rows[i]);
      if (values.size() == 1) part = part.contiguous();
    }
    parts.push_back(std::move(part));
  }
  if (parts.size() == 1) return parts[0];
  return parts[0].dim() == 0 ? at::stack(parts) : at::cat(parts, dim);
}

}  // namespace

Scatter::Scatter(std::vector<IValue> arguments, const std::vector<std::string>& names, int64_t dim)
    : arguments_(std::move(arguments)), dim_(dim) {
  for (size_t i = 0; i < arguments_.size(); ++i) measure(arguments_[i], names.at(i));
}

void Scatter::measure(const IValue& value, const std::string& path) {
  if (value.isTensor()) {
    const at::Tensor& tensor = value.toTensor();
    if (!tensor.defined() || tensor.dim() == 0) return;
    const int64_t dim = wrapped(dim_, tensor);
    if (dim < 0 || dim >= tensor.dim()) {
      throw std::invalid_argument(message("input '", path, "' has shape [", join(tensor.sizes()),
                                          "] and no dimension ", dim_,
                                          " to cut it along; use "
                                          "another dim, or tensors of rank 0 for what every chunk "
                                          "shall get"));
    }
    const int64_t rows = tensor.size(dim);
    if (rows_ < 0) {
      rows_ = rows;
      first_ = path;
    } else if (rows != rows_) {
      throw std::invalid_argument(message("inputs '", first_, "' and '", path, "' have ", rows_,
                                          " and ", rows, " rows in dimension ", dim_,
                                          "; expected the same number in every input"));
    }
  } else if (value.isTuple()) {
    const auto& tuple = value.toTupleRef();
    for (size_t i = 0; i < tuple.elements().size(); ++i) {
      measure(tuple.elements()[i], message(path, "[", i, "]"));
    }
  } else if (value.isList()) {
    const auto list = value.toListRef();
    for (size_t i = 0; i < list.size(); ++i) measure(list[i], message(path, "[", i, "]"));
  } else if (value.isGenericDict()) {
    for (const auto& entry : value.toGenericDict()) {
      measure(entry.value(), message(path, "[", shown(entry.key()), "]"));
    }
  }
}

std::vector<IValue> Scatter::chunk(int64_t begin, int64_t end, int64_t padded_rows) const {
  const auto cut = [&](const at::Tensor& tensor) -> at::Tensor {
    if (!tensor.defined() || tensor.dim() == 0) return tensor;
    const int64_t dim = wrapped(dim_, tensor);
    at::Tensor rows = tensor.narrow(dim, begin, end - begin);
    return end - begin < padded_rows ? padded(rows, dim, padded_rows) : rows;
  };
  std::vector<IValue> arguments;
  arguments.reserve(arguments_.size());
  for (const auto& argument : arguments_) arguments.push_back(mapped(argument, cut));
  return arguments;
}

IValue gather(const std::vector<IValue>& values, int64_t dim, const std::vector<int64_t>& rows,
              int64_t padded_rows) {
  const IValue& first = values.at(0);
  const auto again = [&](const std::vector<IValue>& parts) {
    return gather(parts, dim, rows, padded_rows);
  };
  if (first.isTensor()) return join_tensors(values, dim, rows, padded_rows);
  if (first.isTuple()) {
    const auto& tuple = first.toTupleRef();
    std::vector<IValue> items;
    for (size_t i = 0; i < tuple.elements().size(); ++i) {
      items.push_back(again(
          each(values, [&](const IValue& value) { return value.toTupleRef().elements().at(i); })));
    }
    return c10::ivalue::Tuple::createNamed(std::move(items), tuple.type());
  }
  if (first.isList()) {
    check_counts(values, "list", [](const IValue& value) { return value.toListRef().size(); });
    c10::impl::GenericList items(first.toList().elementType());
    for (size_t i = 0; i < first.toListRef().size(); ++i) {
      items.push_back(
          again(each(values, [&](const IValue& value) { return value.toListRef()[i]; })));
    }
    return items;
  }
  if (first.isGenericDict()) {
    check_counts(values, "dict", [](const IValue& value) { return value.toGenericDict().size(); });
    const auto dict = first.toGenericDict();
    c10::impl::GenericDict items(dict.keyType(), dict.valueType());
    for (const auto& entry : dict) {
      items.insert(entry.key(), again(each(values, [&](const IValue& value) {
                     const auto other = value.toGenericDict();
                     const auto found = other.find(entry.key());
                     if (found == other.end()) {
                       refuse_chunks(message("one has no key ", shown(entry.key())));
                     }
                     return found->value();
                   })));
    }
    return items;
  }
  for (const auto& value : values) {
    if (!(value == first)) {
      refuse_chunks(message("one gives ", first, " and another ", value));
    }
  }
  return first;
}

}  // namespace neuron::parallel
