#include "runtime/executable.h"

namespace neuron::runtime {

const char* to_string(Format format) {
  switch (format) {
    case Format::kInductor:
      return "inductor";
    case Format::kTorchScript:
      return "torchscript";
    case Format::kNeff:
      return "neff";
  }
  return "?";
}

}  // namespace neuron::runtime
