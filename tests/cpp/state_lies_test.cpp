// Tensors of a state that claim more than there is, as a file can make them.
#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "stub_backend.h"
#include "subgraph/state.h"
#include "subgraph/state_digest.h"

namespace neuron::subgraph {
namespace {

at::Tensor claiming(const c10::Storage& storage, int64_t offset, int64_t size) {
  at::Tensor tensor = at::empty({0}, at::kByte);
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(storage);
  impl->set_storage_offset(offset);
  impl->set_sizes_and_strides(std::vector<int64_t>{size}, std::vector<int64_t>{1});
  return tensor;
}

/// Made as PyTorch's reader makes it: the length is one number, the bytes come from elsewhere.
c10::Storage storage_of(size_t bytes, size_t claimed) {
  return c10::Storage(c10::Storage::use_byte_size_t(), claimed,
                      c10::GetDefaultCPUAllocator()->allocate(bytes),
                      /*allocator=*/nullptr, /*resizable=*/false);
}

std::string refusal(const std::string& field, const at::Tensor& tensor, Origin origin) {
  State state = testing::make_state();
  std::get<5>(state).insert_or_assign(field, tensor);
  try {
    decode(state, origin);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "accepted";
}

TEST(StateThatLies, IsRefusedForAViewThatIsNotInItsStorage) {
  const at::Tensor bytes = at::zeros({100}, at::kByte);
  constexpr int64_t kHuge = INT64_MAX;
  for (const auto& [offset, size] :
       std::vector<std::pair<int64_t, int64_t>>{{0, 101},
                                                {1, 100},
                                                {100, 1},
                                                {kHuge, 1},
                                                {kHuge - 1, 5},
                                                {1, kHuge},
                                                {0, kHuge},
                                                {int64_t{1} << 62, int64_t{1} << 62}}) {
    const at::Tensor tensor = claiming(bytes.storage(), offset, size);
    for (const char* field : {"graph", "weights", "code", "state_initial", "constants_opaque"}) {
      const std::string text = refusal(field, tensor, Origin::kTrace);
      EXPECT_NE(text.find(std::string("field '") + field + "' is longer than its data"),
                std::string::npos)
          << offset << "+" << size << ": " << text;
    }
  }
}

TEST(StateThatLies, IsRefusedForAStorageLongerThanItsBytes) {
  for (const size_t bytes : {0, 1, 100}) {
    for (const size_t claimed : {size_t{5000}, size_t{1} << 40}) {
      const at::Tensor tensor =
          claiming(storage_of(bytes, claimed), 0, static_cast<int64_t>(claimed));
      const std::string text = refusal("graph", tensor, Origin::kFile);
      EXPECT_NE(text.find("field 'graph' is longer than its data"), std::string::npos) << text;
    }
  }
}

TEST(StateThatLies, IsRefusedThoughNobodyKnowsTheField) {
  const at::Tensor bytes = at::zeros({100}, at::kByte);
  for (const at::Tensor& tensor : {claiming(bytes.storage(), 0, int64_t{1} << 40),
                                   claiming(storage_of(1, 1 << 20), 0, 1 << 20)}) {
    const std::string text = refusal("later", tensor, Origin::kFile);
    EXPECT_NE(text.find("field 'later' is longer than its data"), std::string::npos) << text;
  }
}

TEST(StateThatLies, IsRefusedForATensorWithoutALength) {
  const std::string text =
      refusal("later", at::zeros({2, 2}, at::kByte).to_sparse(), Origin::kFile);
  EXPECT_NE(text.find("field 'later' is not a dense tensor"), std::string::npos) << text;
}

TEST(StateThatTellsTheTruth, IsAcceptedWhereverItsTensorsComeFrom) {
  std::vector<uint8_t> memory(100, 7);
  const at::Tensor borrowed = at::from_blob(memory.data() + 1, {99}, at::kByte);
  const at::Tensor view = at::zeros({100}, at::kByte).narrow(0, 3, 50);
  const at::Tensor backed = claiming(storage_of(4096, 4096), 96, 4000);
  for (const at::Tensor& tensor : {borrowed, view, backed, at::empty({0}, at::kByte)}) {
    EXPECT_EQ(refusal("graph", tensor, Origin::kTrace), "accepted");
    EXPECT_EQ(refusal("constants_opaque", tensor, Origin::kTrace).find("longer"),
              std::string::npos);
  }
}

}  // namespace
}  // namespace neuron::subgraph
