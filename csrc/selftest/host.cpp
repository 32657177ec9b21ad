// The kernels' own source on the CPU, thread by thread (csrc/emulator). Needs neither a GPU nor torch. Exits with 1, and
// says where the first difference is.

#include "ops/dropout/draw_mask_kernel.cuh"
#include "ops/lora_linear/forward_sm90.cuh"
#include "ops/lora_linear/gemm_sm80.cuh"
#include "ops/lora_linear/gemm_sm90.cuh"
#include "ops/lora_linear/outer_sm80.cuh"
#include "ops/lora_linear/shrink_sm80.cuh"
#include "selftest/forward_problem.h"
#include "selftest/gathered_problem.h"
#include "selftest/gemm_problem.h"
#include "selftest/pass_problems.h"
#include "selftest/report.h"
#include "ops/sparse_delta/gathered_sm80.cuh"
#include "ops/sparse_delta/gathered_sm90.cuh"

#include <algorithm>
#include <cstdio>
#include <exception>

namespace peft_kernels::selftest {
namespace {

constexpr size_t kMargin = 64;  // behind what a kernel writes

template <typename T>
bool margin_is_whole(const std::vector<T>& values) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data() + values.size() - kMargin);
  for (size_t i = 0; i < kMargin * sizeof(T); ++i) {
    if (bytes[i] != 0xFF) return false;
  }
  return true;
}

TensorMap map_of(const void* start, int64_t pitch, int height, int width, int box_height) {
  return {static_cast<char*>(const_cast<void*>(start)), pitch, height, width, box_height};
}

// In several `parts` only where the tile splits K.
template <typename T, typename Tile, bool kByFeature>
std::string gemm(const Problem<T>& problem, unsigned order, int parts = 1) {
  using Gemm = lora_gemm::Gemm<T, Tile, kByFeature>;
  const Shape& shape = problem.shape;
  std::vector<T> out = poisoned<T>(problem.size() + kMargin);
  std::vector<float> partials = poisoned<float>((parts > 1 ? parts * problem.size() : 0) + kMargin);
  const lora_gemm::Arguments args = problem.arguments(out.data(), partials.data(), parts);
  const int blocks = tiles_of(shape.rows, Tile::kRows) * tiles_of(shape.columns, Tile::kColumns) * parts;
  const emulator::Report report = emulator::launch(blocks, Gemm::kThreads, Gemm::kSharedBytes, order,
                                                   [&](char* shared) { Gemm::run(args, shared); });
  if (report.bank_conflicts) return std::to_string(report.bank_conflicts) + " bank conflicts";
  if (!margin_is_whole(out) || !margin_is_whole(partials)) return "written behind the end";
  return problem.complaint(parts > 1 ? problem.reduced(partials, parts) : out);
}

template <typename T, typename Tile>
void gemm(const Problem<T>& problem, const char* name) {
  for (const unsigned order : {0u, 1u}) {
    report(std::string("gemm_sm80<") + name + ">, " + problem.shape.text(),
           problem.shape.by_feature ? gemm<T, Tile, true>(problem, order) : gemm<T, Tile, false>(problem, order));
  }
}

template <typename T, typename Tile, bool kByFeature>
std::string box_gemm(const Problem<T>& problem, unsigned order, int parts = 1) {
  using Gemm = lora_gemm::BoxGemm<T, Tile, kByFeature>;
  using Product = typename Gemm::Product;
  std::vector<T> out = poisoned<T>(problem.size() + kMargin);
  std::vector<float> partials = poisoned<float>((parts > 1 ? parts * problem.size() : 0) + kMargin);
  const lora_gemm::Arguments args = problem.arguments(out.data(), partials.data(), parts);
  lora_gemm::BoxArguments boxes{};
  const auto add = [&](lora_gemm::BoxPair& to, const lora_gemm::Pair& pair) {
    to.left = map_of(pair.left, pair.left_pitch, args.rows, pair.K, Product::kLeftBox);
    to.right = map_of(pair.right, pair.right_pitch, kByFeature ? args.columns : pair.K,
                      kByFeature ? pair.K : args.columns, Product::kRightBox);
    to.K = pair.K;
  };
  for (int j = 0; j < args.pairs; ++j) add(boxes.base[j], args.base[j]), add(boxes.low[j], args.low[j]);
  boxes.pairs = args.pairs;
  boxes.out = map_of(args.out, args.columns, args.rows, args.columns, Product::kGroupRows);
  std::copy_n(args.dropout_mask, lora_gemm::kMostPairs, boxes.dropout_mask);
  boxes.masks = args.masks, boxes.bias = args.bias;
  boxes.rows = args.rows, boxes.columns = args.columns;
  boxes.partials = args.partials, boxes.parts = args.parts, boxes.part = args.part;
  // Fewer clusters than tiles, so that each has several.
  const int clusters = static_cast<int>((Product::clusters_of(args.rows, args.columns) * parts + 2) / 3);
  emulator::launch(clusters * Tile::kCluster, Gemm::kThreads, Gemm::kSharedBytes, order,
                   [&](char* shared) { Gemm::run(boxes, shared); }, Tile::kCluster);
  if (!margin_is_whole(out) || !margin_is_whole(partials)) return "written behind the end";
  return problem.complaint(parts > 1 ? problem.reduced(partials, parts) : out);
}

template <typename T, typename Tile>
void box_gemm(const Problem<T>& problem, const char* name) {
  for (const unsigned order : {0u, 1u, 2u}) {
    report(std::string("gemm_sm90<") + name + ">, " + problem.shape.text(),
           problem.shape.by_feature ? box_gemm<T, Tile, true>(problem, order) : box_gemm<T, Tile, false>(problem, order));
  }
}

template <typename T>
void box_gemms(const std::string& dtype) {
  for (const Shape& shape : box_shapes(false)) {
    const Problem<T> problem(shape);
    box_gemm<T, BoxWide>(problem, (dtype + ", BoxWide").c_str());
    box_gemm<T, BoxSquare>(problem, (dtype + ", BoxSquare").c_str());
    if (problem.parts() < 2) continue;
    report("gemm_sm90<" + dtype + ", BoxSquare>, split, " + shape.text(),
           shape.by_feature ? box_gemm<T, BoxSquare, true>(problem, 1, problem.parts())
                            : box_gemm<T, BoxSquare, false>(problem, 1, problem.parts()));
  }
}

template <typename T>
void gemms(const std::string& dtype) {
  for (const Shape& shape : shapes(false)) {
    const Problem<T> problem(shape);
    gemm<T, Wide>(problem, (dtype + ", Wide").c_str());
    gemm<T, Square>(problem, (dtype + ", Square").c_str());
    gemm<T, Small>(problem, (dtype + ", Small").c_str());
    if (problem.parts() < 2) continue;
    report("gemm_sm80<" + dtype + ", Small>, split, " + shape.text(),
           shape.by_feature ? gemm<T, Small, true>(problem, 1, problem.parts())
                            : gemm<T, Small, false>(problem, 1, problem.parts()));
  }
}

// Of tiles taken `per_cluster` at a time.
template <typename T, int kRanks>
std::string forward(const ForwardProblem<T>& problem, unsigned order, int per_cluster) {
  using Forward = lora_forward::BoxForward<T, kRanks>;
  using Product = typename Forward::Product;
  std::vector<T> y = poisoned<T>(problem.y_size() + kMargin), s = poisoned<T>(problem.s_size() + kMargin);
  const lora_forward::Arguments args = problem.arguments(
      problem.x().data(), problem.weight().data(), problem.lora_A().data(), problem.lora_B().data(),
      problem.bias().data(), problem.row_scale().data(), y.data(), s.data());
  const auto map = [](const lora_forward::Operand& operand, int height, int width, int box_height) {
    return map_of(operand.start, operand.pitch, height, width, box_height);
  };
  const lora_forward::BoxArguments boxes{map(args.x, args.rows, args.K, Product::kLeftBox),
                                         map(args.weight, args.columns, args.K, Product::kRightBox),
                                         map(args.lora_A, args.rank, args.K, kRanks),
                                         map(args.lora_B, args.columns, args.rank, Product::kRightBox),
                                         map_of(args.y, args.columns, args.rows, args.columns, Product::kGroupRows),
                                         args.bias, args.row_scale, args.scale, args.s,
                                         args.rows, args.columns, args.K, args.rank, per_cluster};
  const int clusters = tiles_of(Product::clusters_of(args.rows, args.columns), per_cluster);
  emulator::launch(clusters * Product::kCluster, Forward::kThreads, Forward::kSharedBytes, order,
                   [&](char* shared) { Forward::run(boxes, shared); }, Product::kCluster);
  return margin_is_whole(y) && margin_is_whole(s) ? problem.complaint(y, s) : "written behind the end";
}

template <typename T>
void forward(const std::string& dtype) {
  for (const ForwardProblem<T>& problem : forwards<T>(false)) {
    for (const unsigned order : {0u, 1u, 2u}) {
      const int per_cluster = order == 0 ? 1 : order == 1 ? 4 : 5;
      report("forward_sm90<" + dtype + ">, " + problem.text(),
             problem.rank <= 16   ? forward<T, 16>(problem, order, per_cluster)
             : problem.rank <= 32 ? forward<T, 32>(problem, order, per_cluster)
                                  : forward<T, 64>(problem, order, per_cluster));
    }
  }
}

template <typename T, int kColumns, bool kByFeature>
std::string shrink(const ShrinkProblem<T>& problem, unsigned order) {
  using Shrink = lora_shrink::Shrink<T, kColumns, kByFeature>;
  std::vector<float> partials = poisoned<float>(problem.results() + kMargin);
  std::vector<uint8_t> mask = poisoned<uint8_t>(problem.mask_bytes() + kMargin);
  const int64_t seed = MaskProblem::kSeed;
  const lora_shrink::Arguments args = problem.arguments(problem.activation_values().data(), problem.rank_factor_values().data(),
                                                        partials.data(), &seed, mask.data());
  const emulator::Report report =
      emulator::launch(static_cast<int>(lora_shrink::blocks_of<kColumns>(args)), lora_shrink::kThreads,
                       Shrink::kSharedBytes, order, [&](char* shared) { Shrink::run(args, shared); });
  if (report.bank_conflicts) return std::to_string(report.bank_conflicts) + " bank conflicts";
  if (!margin_is_whole(partials) || !margin_is_whole(mask)) return "written behind the end";
  return problem.complaint(partials, mask);
}

template <typename T, int kColumns>
void shrink(const std::string& dtype) {
  for (const ShrinkProblem<T>& problem : shrinks<T>()) {
    for (const unsigned order : {0u, 1u}) {
      report("shrink_sm80<" + dtype + ", " + std::to_string(kColumns) + ">, " + problem.text(),
             problem.by_feature ? shrink<T, kColumns, true>(problem, order) : shrink<T, kColumns, false>(problem, order));
    }
  }
}

template <typename T, int kWidth, bool kShrinks>
std::string outer(const OuterProblem<T>& problem, unsigned order) {
  using Outer = lora_outer::Outer<T, kWidth, kShrinks>;
  std::vector<float> sums = poisoned<float>(problem.sums() + kMargin);
  std::vector<float> shrunk = poisoned<float>(problem.shrunk() + kMargin);
  const lora_outer::Arguments args =
      problem.arguments(problem.activation_values().data(), problem.rank_factor_values().data(), problem.lora_B_values().data(),
                        problem.dropout_mask().data(), sums.data(), shrunk.data());
  const emulator::Report report =
      emulator::launch(static_cast<int>(lora_outer::blocks_of(args)), lora_outer::kThreads,
                       Outer::shared_bytes(args), order,
                       [&](char* shared) { Outer::run(args, shared); });
  if (report.bank_conflicts) return std::to_string(report.bank_conflicts) + " bank conflicts";
  if (!margin_is_whole(sums) || !margin_is_whole(shrunk)) return "written behind the end";
  return problem.complaint(sums, shrunk);
}

template <typename T, int kWidth>
void outer(const std::string& dtype) {
  for (const OuterProblem<T>& problem : outers<T>(kWidth)) {
    for (const unsigned order : {0u, 1u}) {
      report("outer_sm80<" + dtype + ", " + std::to_string(kWidth) + ">, " + problem.text(),
             problem.shrinks ? outer<T, kWidth, true>(problem, order) : outer<T, kWidth, false>(problem, order));
    }
  }
}

// Where chunks begin, by blocks of 64 threads.
template <typename T>
std::string gathered(const GatheredProblem<T>& problem, unsigned order, TileName tile) {
  using namespace sparse_gathered;
  std::vector<int32_t> begins = poisoned<int32_t>(problem.begins() + kMargin);
  std::vector<float> partials = poisoned<float>(problem.partials() + kMargin);
  const Arguments args = problem.arguments(problem.dy().data(), problem.x().data(), problem.starts().data(),
                                           problem.held().data(), begins.data(), partials.data());
  if (args.entries.starts != nullptr) {
    emulator::launch(static_cast<int>(problem.begins() / 64 + 1), 64, 0, order, [&](char*) {
      find_begin(args.entries, begins.data(), static_cast<int64_t>(block_index()) * 64 + thread_index());
    });
    if (!margin_is_whole(begins)) return "written behind the end of begins";
  }
  const auto by_boxes = [&](auto kernel) {
    using Kernel = decltype(kernel);
    using Product = typename Kernel::Product;
    const BoxArguments boxes{map_of(args.dy, args.dy_pitch, problem.tokens, problem.rows, Product::kLeftBox),
                             map_of(args.x, args.x_pitch, problem.tokens, problem.width, Product::kRightBox), args};
    const int clusters = static_cast<int>((Product::clusters_of(problem.rows, problem.width) * problem.parts + 2) / 3);
    emulator::launch(clusters * Product::kCluster, Kernel::kThreads, Kernel::kSharedBytes, order,
                     [&](char* shared) { Kernel::run(boxes, shared); }, Product::kCluster);
  };
  if (tile == TileName::kBoxWide) {
    by_boxes(BoxGathered<T, BoxWide>());
  } else if (tile == TileName::kBoxSquare) {
    by_boxes(BoxGathered<T, BoxSquare>());
  } else {
    using Kernel = Gathered<T>;
    const emulator::Report report =
        emulator::launch(static_cast<int>(Kernel::blocks_of(args)), Kernel::kThreads, Kernel::kSharedBytes, order,
                         [&](char* shared) { Kernel::run(args, shared); });
    if (report.bank_conflicts) return std::to_string(report.bank_conflicts) + " bank conflicts";
  }
  return margin_is_whole(partials) ? problem.complaint(partials) : "written behind the end";
}

template <typename T>
void gathered(const std::string& dtype) {
  for (const GatheredProblem<T>& problem : gathereds<T>()) {
    for (const unsigned order : {0u, 1u}) {
      report("gathered_sm80<" + dtype + ">, " + problem.text(), gathered(problem, order, TileName::kSquare));
      report("gathered_sm90<" + dtype + ", BoxWide>, " + problem.text(), gathered(problem, order, TileName::kBoxWide));
      report("gathered_sm90<" + dtype + ", BoxSquare>, " + problem.text(),
             gathered(problem, order, TileName::kBoxSquare));
    }
  }
}

void masks() {
  for (const MaskProblem& problem : mask_problems()) {
    const int64_t seed = MaskProblem::kSeed;
    std::vector<uint8_t> mask = poisoned<uint8_t>(problem.numel() + kMargin);
    const dropout::Arguments args = problem.arguments(&seed, mask.data());
    constexpr int kPerBlock = dropout::kThreads * dropout::kBytes;
    const int blocks = static_cast<int>((args.numel + kPerBlock - 1) / kPerBlock);
    emulator::launch(blocks, dropout::kThreads, 0, 1, [&](char*) { dropout::draw_mask_kernel(args); });
    const bool whole = margin_is_whole(mask);
    mask.resize(problem.numel());
    report("draw_mask", !whole ? "written behind the end" : mask == problem.expected() ? "" : "other bits");
  }
}

template <typename Out, int kWidth>
void reduce(const char* name) {
  const std::vector<Reduction<Out>> problems = reductions<Out>();
  std::vector<std::vector<Out>> outs;
  for (const Reduction<Out>& problem : problems) outs.push_back(poisoned<Out>(problem.numel() + kMargin));
  reduction::Arguments args{};
  int blocks = 0;
  for (size_t j = 0; j < problems.size(); ++j) {
    blocks = append<kWidth>(args, problems[j].sum(problems[j].values.data(), problems[j].row_scale.data(), outs[j].data()));
  }
  emulator::launch(blocks, reduction::kThreads, 0, 1, [&](char*) { reduction::kernel<Out, kWidth>(args); });
  for (size_t j = 0; j < problems.size(); ++j) {
    report(std::string("reduce_partials<") + name + ">",
           margin_is_whole(outs[j]) ? problems[j].complaint(outs[j]) : "written behind the end of out");
  }
}

void in_bfloat16() {
  reduce<__nv_bfloat16, 4>("bfloat16, 4");
  reduce<__nv_bfloat16, 1>("bfloat16, 1");
  shrink<__nv_bfloat16, 16>("bfloat16");
  shrink<__nv_bfloat16, 64>("bfloat16");
  outer<__nv_bfloat16, 16>("bfloat16");
  outer<__nv_bfloat16, 64>("bfloat16");
  gathered<__nv_bfloat16>("bfloat16");
  box_gemms<__nv_bfloat16>("bfloat16");
  forward<__nv_bfloat16>("bfloat16");
  gemms<__nv_bfloat16>("bfloat16");
}

void in_float16_and_others() {
  masks();
  reduce<float, 4>("float, 4");
  reduce<float, 1>("float, 1");
  reduce<__half, 4>("half, 4");
  reduce<__half, 1>("half, 1");
  shrink<__half, 32>("float16");
  outer<__half, 32>("float16");
  gathered<__half>("float16");
  box_gemms<__half>("float16");
  forward<__half>("float16");
  gemms<__half>("float16");
}

}  // namespace
}  // namespace peft_kernels::selftest

// All of it, or one half: "bfloat16" or "others".
int main(int count, char** arguments) try {
  const std::string half = count > 1 ? arguments[1] : "";
  if (half != "others") peft_kernels::selftest::in_bfloat16();
  if (half != "bfloat16") peft_kernels::selftest::in_float16_and_others();
  return peft_kernels::selftest::finish();
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
