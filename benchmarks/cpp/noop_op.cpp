// A custom op that does nothing, with a custom class as its second argument: what any op of this
// signature costs.
#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <vector>

namespace {

struct Holder : torch::CustomClassHolder {};

TORCH_LIBRARY(neuron_bench, m) {
  m.class_<Holder>("Holder")
      .def(torch::init<>())
      .def_pickle([](const c10::intrusive_ptr<Holder>&) { return int64_t{0}; },
                  [](int64_t) { return c10::make_intrusive<Holder>(); });
  m.def("noop(Tensor[] inputs, __torch__.torch.classes.neuron_bench.Holder holder) -> Tensor[]",
        [](const std::vector<at::Tensor>& inputs, const c10::intrusive_ptr<Holder>&) {
          return std::vector<at::Tensor>{inputs[0]};
        });
}

}  // namespace
