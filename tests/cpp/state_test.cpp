#include "subgraph/state.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <functional>
#include <stdexcept>

#include "runtime/quick_checksum.h"
#include "stub_backend.h"

namespace neuron::subgraph {
namespace {

using runtime::Executable;
using runtime::Format;

Executable inductor_executable() {
  Executable executable;
  executable.name = "net";
  executable.producer = "neuron_ext 0.1.0";
  executable.format = Format::kInductor;
  executable.inputs = {{"x", at::kFloat, {2, 3}}, {"y['mask']", at::kBool, {}}};
  executable.outputs = {{"", at::kBFloat16, {0, 7}}};
  executable.mutated_inputs = {1};
  executable.requirements = {"x86_64", {"avx2", "fma"}, "2.13.0", "host"};
  executable.code =
      std::make_shared<runtime::Content>(at::arange(100, at::kByte), "c0de", std::nullopt);
  const auto weights = at::arange(192, at::kByte);
  executable.weights =
      std::make_shared<runtime::Content>(weights, "3e19", runtime::quick_checksum(weights));
  executable.constants = {
      {"w", "net.weight", at::kFloat, at::kStrided, 0, 64, {4, 4}, {1, 4}, {}},
      {"_frozen_param0",
       "_frozen_param0",
       at::kFloat,
       at::kMkldnn,
       64,
       128,
       {2, 2},
       {2, 0},
       {1, 2, 3}},
      {"scalar", "scalar", at::kLong, at::kStrided, 184, 8, {}, {}, {}},
  };
  return executable;
}

State good_state() {
  return encode(inductor_executable(), {true, false, true, {1, 2}});
}

TEST(State, DecodesToWhatWasEncoded) {
  const auto [executable, wishes] = decode(good_state(), Origin::kFile);
  const Executable original = inductor_executable();
  EXPECT_TRUE(wishes.lazy_load);
  EXPECT_FALSE(wishes.async_load);
  EXPECT_TRUE(wishes.dynamic_batch);
  EXPECT_EQ(wishes.placement, (Placement{1, 2}));
  EXPECT_EQ(executable->name, "net");
  EXPECT_EQ(executable->producer, original.producer);
  EXPECT_EQ(executable->format, Format::kInductor);
  ASSERT_EQ(executable->inputs.size(), 2U);
  EXPECT_EQ(executable->inputs[1].name, "y['mask']");
  EXPECT_EQ(executable->inputs[1].dtype, at::kBool);
  EXPECT_EQ(executable->inputs[0].shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(executable->inputs[1].shape, std::vector<int64_t>{});
  EXPECT_EQ(executable->outputs[0].dtype, at::kBFloat16);
  EXPECT_EQ(executable->mutated_inputs, original.mutated_inputs);
  EXPECT_EQ(executable->requirements.arch, "x86_64");
  EXPECT_EQ(executable->requirements.cpu_features, original.requirements.cpu_features);
  EXPECT_EQ(executable->requirements.torch_version, "2.13.0");
  EXPECT_TRUE(at::equal(executable->code->bytes(), original.code->bytes()));
  EXPECT_TRUE(at::equal(executable->weights->bytes(), original.weights->bytes()));
  EXPECT_EQ(executable->graph, nullptr);
  ASSERT_EQ(executable->constants.size(), 3U);
  EXPECT_EQ(executable->constants[0].strides, (std::vector<int64_t>{1, 4}));
  EXPECT_EQ(executable->constants[0].fqn, "net.weight");
  EXPECT_EQ(executable->constants[1].layout, at::kMkldnn);
  EXPECT_EQ(executable->constants[1].opaque, (std::vector<uint8_t>{1, 2, 3}));
  EXPECT_EQ(executable->constants[2].offset, 184);
}

TEST(State, SharesTensorsAndDoesNotCopyThem) {
  const State state = good_state();
  const auto decoded = decode(state, Origin::kTrace);
  EXPECT_EQ(decoded.executable->weights->bytes().const_data_ptr(),
            std::get<5>(state).at("weights").const_data_ptr());
}

TEST(State, EncodesTheSameAgain) {
  const State once = good_state();
  const auto decoded = decode(once, Origin::kFile);
  const State twice = encode(*decoded.executable, decoded.wishes);
  EXPECT_EQ(std::get<0>(once), std::get<0>(twice));
  const auto same = [](const auto& a, const auto& b) {
    ASSERT_EQ(a.size(), b.size());
    for (const auto& entry : a) EXPECT_EQ(entry.value(), b.at(entry.key())) << entry.key();
  };
  same(std::get<1>(once), std::get<1>(twice));
  same(std::get<2>(once), std::get<2>(twice));
  for (const auto& entry : std::get<3>(once)) {
    EXPECT_EQ(entry.value().vec(), std::get<3>(twice).at(entry.key()).vec()) << entry.key();
  }
  for (const auto& entry : std::get<4>(once)) {
    EXPECT_EQ(entry.value().vec(), std::get<4>(twice).at(entry.key()).vec()) << entry.key();
  }
  for (const auto& entry : std::get<5>(once)) {
    EXPECT_TRUE(at::equal(entry.value(), std::get<5>(twice).at(entry.key()))) << entry.key();
  }
}

std::string refusal(const State& state) {
  try {
    decode(state, Origin::kTrace);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "accepted";
}

TEST(State, JudgesTheVersionBeforeAnythingElse) {
  State future = good_state();
  std::get<0>(future) = 2;
  std::get<2>(future).clear();
  EXPECT_NE(refusal(future).find("version 2"), std::string::npos) << refusal(future);
  EXPECT_NE(refusal(future).find("install a newer neuron_ext"), std::string::npos);
  State junk = good_state();
  std::get<0>(junk) = 0;
  EXPECT_NE(refusal(junk).find("'version' is 0"), std::string::npos) << refusal(junk);
}

TEST(State, IgnoresFieldsItDoesNotKnow) {
  State state = good_state();
  std::get<1>(state).insert("a_later_flag", 1);
  std::get<2>(state).insert("a_later_text", "text");
  std::get<5>(state).insert("a_later_tensor", at::zeros({3}));
  EXPECT_EQ(refusal(state), "accepted");
}

TEST(State, WishesAreOptional) {
  State state = good_state();
  std::get<1>(state).clear();
  const auto wishes = decode(state, Origin::kTrace).wishes;
  EXPECT_FALSE(wishes.lazy_load);
  EXPECT_EQ(wishes.placement, (Placement{-1, -1}));
}

TEST(State, OfAFileMustHaveTheDigestOfItsFields) {
  const auto refusal_of_file = [](const State& state) -> std::string {
    try {
      decode(state, Origin::kFile);
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_EQ(refusal_of_file(good_state()), "accepted");
  const std::vector<std::function<void(State&)>> changes = {
      [](State& s) { std::get<1>(s).insert_or_assign("lazy_load", 0); },
      [](State& s) { std::get<1>(s).insert("unknown", 0); },
      [](State& s) { std::get<2>(s).insert_or_assign("name", "nut"); },
      [](State& s) { std::get<2>(s).insert_or_assign("sha256_code", "c0dd"); },
      [](State& s) { std::get<3>(s).at("input_shapes").set(0, 3); },
      [](State& s) { std::get<4>(s).at("constant_names").set(0, "v"); },
      [](State& s) { std::get<5>(s).at("constants_opaque")[1] = 9; },
      [](State& s) { std::get<5>(s).insert_or_assign("code", at::zeros({99}, at::kByte)); },
      [](State& s) { static_cast<void>(std::get<2>(s).erase("sha256_state")); },
  };
  for (size_t i = 0; i < changes.size(); ++i) {
    State state = good_state();
    changes[i](state);
    EXPECT_NE(refusal_of_file(state).find("sha256_state"), std::string::npos)
        << i << ": " << refusal_of_file(state);
  }
}

struct BadField {
  std::string field;
  std::function<void(State&)> damage;
};

void PrintTo(const BadField& bad, std::ostream* out) {
  *out << bad.field;
}

class StateWithABadField : public ::testing::TestWithParam<BadField> {};

TEST_P(StateWithABadField, IsRefusedNamingIt) {
  State state = good_state();
  GetParam().damage(state);
  const std::string text = refusal(state);
  EXPECT_NE(text.find("field '" + GetParam().field + "'"), std::string::npos) << text;
}

template <size_t Bag, typename Value>
BadField set(const std::string& field, Value value, const std::string& blamed = "") {
  return {blamed.empty() ? field : blamed,
          [=](State& state) { std::get<Bag>(state).insert_or_assign(field, value); }};
}

BadField ints(const std::string& field, std::initializer_list<int64_t> values,
              const std::string& blamed = "") {
  return set<3>(field, c10::List<int64_t>(values), blamed);
}

BadField strings(const std::string& field, std::initializer_list<std::string> values,
                 const std::string& blamed = "") {
  return set<4>(field, c10::List<std::string>(values), blamed);
}

template <size_t Bag>
BadField without(const std::string& field) {
  return {field, [=](State& state) { static_cast<void>(std::get<Bag>(state).erase(field)); }};
}

INSTANTIATE_TEST_SUITE_P(
    Each, StateWithABadField,
    ::testing::Values(
        set<1>("lazy_load", int64_t{2}), set<1>("async_load", int64_t{-1}),
        set<1>("dynamic_batch", int64_t{7}), set<1>("start_nc", int64_t{-2}),
        set<1>("start_nc", int64_t{1} << 40), set<1>("nc_count", int64_t{0}),
        set<1>("nc_count", int64_t{-5}), without<2>("name"), without<2>("format"),
        without<2>("arch"), without<2>("torch_version"), set<2>("format", std::string("zip")),
        ints("input_ranks", {2}), ints("input_ranks", {2, -1}, "input_shapes"),
        ints("input_ranks", {2, 1000}, "input_shapes"), ints("input_shapes", {2}),
        ints("input_shapes", {2, 3, 4}), ints("input_shapes", {2, -3}),
        ints("input_shapes", {int64_t{1} << 40, int64_t{1} << 40}), strings("input_names", {"x"}),
        strings("input_dtypes", {"float32", "float31"}),
        strings("output_dtypes", {}, "output_ranks"), strings("output_names", {"a", "b"}),
        ints("mutated_inputs", {2}), ints("mutated_inputs", {-1}), without<5>("code"),
        set<5>("code", at::zeros({4})), set<5>("code", at::zeros({2, 2}, at::kByte)),
        set<5>("weights", at::zeros({8}, at::kByte).slice(0, 0, 8, 2)),
        set<5>("weights", at::zeros({10}, at::kByte), "constant_offsets"),
        ints("constant_offsets", {0, 64}), ints("constant_offsets", {-8, 64, 184}),
        ints("constant_offsets", {0, 64, 1000}),
        ints("constant_sizes", {64, int64_t{1} << 62, 8}, "constant_offsets"),
        ints("constant_sizes", {63, 128, 8}, "constant_shapes"),
        ints("constant_strides", {1, int64_t{1} << 60, 2, 0}, "constant_shapes"),
        ints("constant_strides", {1, -4, 2, 0}), ints("constant_shapes", {4, 4, 2}),
        ints("constant_opaque_sizes", {0, 4, 0}), ints("constant_opaque_sizes", {0, 2, 0}),
        ints("constant_opaque_sizes", {0, -3, 0}),
        strings("constant_layouts", {"strided", "sparse", "strided"}),
        strings("constant_dtypes", {"float32", "float32", "int65"}),
        strings("constant_names", {"w"}, "constant_fqns")));

TEST(QuickChecksum, FindsAnyChangedByte) {
  for (const int64_t size : {1, 7, 8, 9, 64, 100}) {
    const at::Tensor bytes = at::arange(size, at::kByte);
    const int64_t before = runtime::quick_checksum(bytes);
    for (int64_t i = 0; i < size; ++i) {
      at::Tensor changed = bytes.clone();
      changed[i] = bytes[i].item<int64_t>() ^ 0x80;
      EXPECT_NE(runtime::quick_checksum(changed), before) << size << " " << i;
    }
  }
  EXPECT_EQ(runtime::quick_checksum(at::ones({9}, at::kByte)), 0x0101010101010101 + 1);
}

}  // namespace
}  // namespace neuron::subgraph
