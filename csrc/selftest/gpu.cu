// The kernels on the GPU, against sums in float64 on the host. Without torch, for compute-sanitizer and profilers. Exits
// with 1 at a difference, with 77 where there is no GPU.

#include "ops/dropout/draw_mask_kernel.cuh"
#include "ops/lora_linear/forward_sm90_launch.h"
#include "ops/lora_linear/gemm_sm80_launch.h"
#include "ops/lora_linear/gemm_sm90_launch.h"
#include "ops/lora_linear/outer_sm80_launch.h"
#include "ops/lora_linear/shrink_sm80_launch.h"
#include "selftest/forward_problem.h"
#include "selftest/gathered_problem.h"
#include "selftest/gemm_problem.h"
#include "selftest/pass_problems.h"
#include "selftest/report.h"
#include "ops/sparse_delta/gathered_launch.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <iterator>
#include <type_traits>
#include <utility>

namespace peft_kernels::selftest {
namespace {

void check(const Status& status, const char* what) {
  if (status.ok()) return;
  std::printf("%s: %s\n", what, status.text().c_str());
  std::exit(1);
}

// A copy on the device, in an allocation of its own, behind which compute-sanitizer sees every access.
template <typename T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& values) : size_(values.size()) {
    check(cudaMalloc(&data_, std::max<size_t>(size_ * sizeof(T), 1)), "cudaMalloc");
    check(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() { cudaFree(data_); }
  T* get() const { return data_; }
  std::vector<T> host() const {
    std::vector<T> values(size_);
    check(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }

 private:
  size_t size_;
  T* data_ = nullptr;
};

// Large ones in one dtype: the host's float64 sums take seconds.
template <typename T>
constexpr bool kLarge = std::is_same_v<T, __nv_bfloat16>;

// Three launches, to the same bits; in `parts`, added up by the host. `launch` takes the arguments.
template <typename T, typename Launch>
void gemm(const Problem<T>& problem, const std::string& name, const Launch& launch, int parts = 1) {
  const Shape& shape = problem.shape;
  std::deque<OnDevice<T>> operands;
  const auto on_device = [&](const typename Problem<T>::Operands& pair) {
    const OnDevice<T>& left = operands.emplace_back(pair.left.values);
    return pair.at(left.get(), operands.emplace_back(pair.right.values).get());
  };
  lora_gemm::Pair base[lora_gemm::kMostPairs], low[lora_gemm::kMostPairs];
  for (int j = 0; j < shape.pairs; ++j) base[j] = on_device(problem.base[j]), low[j] = on_device(problem.low[j]);
  const OnDevice<T> bias(problem.bias.values);
  std::deque<OnDevice<uint8_t>> dropout_mask(problem.dropout_mask.begin(), problem.dropout_mask.end());
  std::vector<T> first;
  std::string complaint;
  for (int repeat = 0; repeat < 3 && complaint.empty(); ++repeat) {
    const OnDevice<T> out(poisoned<T>(problem.size()));
    const OnDevice<float> partials(poisoned<float>(parts > 1 ? parts * problem.size() : 0));
    lora_gemm::Arguments args = problem.arguments(out.get(), partials.get(), parts);
    std::copy_n(base, shape.pairs, args.base);
    std::copy_n(low, shape.pairs, args.low);
    for (int mask = 0; mask < args.masks; ++mask) args.dropout_mask[mask] = dropout_mask[mask].get() + problem.start;
    args.bias = args.bias ? bias.get() + problem.start : nullptr;
    check(launch(args), ("launching " + name).c_str());
    check(cudaDeviceSynchronize(), name.c_str());
    const std::vector<T> found = parts > 1 ? problem.reduced(partials.host(), parts) : out.host();
    if (repeat == 0) {
      complaint = problem.complaint(found);
      first = found;
    } else if (std::memcmp(first.data(), found.data(), found.size() * sizeof(T)) != 0) {
      complaint = "other bits when repeated";
    }
  }
  report(name + ", " + shape.text(), complaint);
}

template <typename T>
void gemms(const std::string& dtype, bool large) {
  for (const Shape& shape : shapes(large && kLarge<T>)) {
    const Problem<T> problem(shape);
    for (const auto& [tile, name] : {std::pair{TileName::kWide, ", Wide>"}, {TileName::kSquare, ", Square>"},
                                     {TileName::kSmall, ", Small>"}}) {
      gemm(problem, "gemm_sm80<" + dtype + name, [&, tile = tile](const lora_gemm::Arguments& args) {
        return shape.by_feature ? lora_gemm::launch_sm80<T, true>(args, tile, nullptr)
                                : lora_gemm::launch_sm80<T, false>(args, tile, nullptr);
      });
    }
    if (problem.parts() < 2) continue;
    const auto split = [&](const lora_gemm::Arguments& args) {
      return shape.by_feature ? lora_gemm::launch_sm80<T, true>(args, TileName::kSmall, nullptr)
                              : lora_gemm::launch_sm80<T, false>(args, TileName::kSmall, nullptr);
    };
    gemm(problem, "gemm_sm80<" + dtype + ", Small>, split", split, problem.parts());
  }
}

// On two SMs too, so that a block has several tiles.
template <typename T>
void box_gemms(const std::string& dtype, int all_processors, bool large) {
  for (const Shape& shape : box_shapes(large && kLarge<T>)) {
    const Problem<T> problem(shape);
    for (const int processors : {all_processors, 2}) {
      const auto by = [&](TileName tile) {
        return [&, tile](const lora_gemm::Arguments& args) {
          return shape.by_feature ? lora_gemm::launch_sm90<T, true>(args, tile, processors, nullptr)
                                  : lora_gemm::launch_sm90<T, false>(args, tile, processors, nullptr);
        };
      };
      gemm(problem, "gemm_sm90<" + dtype + ", BoxWide>", by(TileName::kBoxWide));
      gemm(problem, "gemm_sm90<" + dtype + ", BoxSquare>", by(TileName::kBoxSquare));
      if (problem.parts() < 2) continue;
      gemm(problem, "gemm_sm90<" + dtype + ", BoxSquare>, split", by(TileName::kBoxSquare), problem.parts());
    }
  }
}

// Twice, to the same bits; on two SMs too, so that a cluster has several tiles.
template <typename T>
void forward(const std::string& dtype, int all_processors, bool large) {
  for (const ForwardProblem<T>& problem : forwards<T>(large && kLarge<T>)) {
    const OnDevice<T> x(problem.x()), weight(problem.weight()), lora_A(problem.lora_A()), lora_B(problem.lora_B());
    const OnDevice<T> bias(problem.bias());
    const OnDevice<float> row_scale(problem.row_scale());
    std::vector<T> first;
    for (const int processors : {all_processors, 2}) {
      const OnDevice<T> y(poisoned<T>(problem.y_size())), s(poisoned<T>(problem.s_size()));
      check(lora_forward::launch_sm90<T>(
                problem.arguments(x.get(), weight.get(), lora_A.get(), lora_B.get(), bias.get(), row_scale.get(),
                                  y.get(), s.get()),
                processors, nullptr),
            "launching forward_sm90");
      check(cudaDeviceSynchronize(), "forward_sm90");
      const std::vector<T> found = y.host();
      std::string complaint;
      if (first.empty()) {
        complaint = problem.complaint(found, s.host());
        first = found;
      } else if (std::memcmp(first.data(), found.data(), found.size() * sizeof(T)) != 0) {
        complaint = "other bits on two SMs";
      }
      report("forward_sm90<" + dtype + ">, " + problem.text(), complaint);
    }
  }
}

template <typename T>
void shrink(const std::string& dtype) {
  for (const ShrinkProblem<T>& problem : shrinks<T>()) {
    const OnDevice<T> activation(problem.activation_values()), rank_factor(problem.rank_factor_values());
    const OnDevice<float> partials(poisoned<float>(problem.results()));
    const OnDevice<int64_t> seed(std::vector<int64_t>{MaskProblem::kSeed});
    const OnDevice<uint8_t> mask(poisoned<uint8_t>(problem.mask_bytes()));
    const lora_shrink::Arguments args =
        problem.arguments(activation.get(), rank_factor.get(), partials.get(), seed.get(), mask.get());
    check(problem.by_feature ? lora_shrink::launch_sm80<T, true>(args, nullptr)
                             : lora_shrink::launch_sm80<T, false>(args, nullptr),
          "launching shrink_sm80");
    check(cudaDeviceSynchronize(), "shrink_sm80");
    report("shrink_sm80<" + dtype + ">, " + problem.text(), problem.complaint(partials.host(), mask.host()));
  }
}

template <typename T>
void outer(const std::string& dtype) {
  for (const int width : {16, 32, 64}) {
    for (const OuterProblem<T>& problem : outers<T>(width)) {
      const OnDevice<T> activation(problem.activation_values()), rank_factor(problem.rank_factor_values());
      const OnDevice<T> lora_B(problem.lora_B_values());
      const OnDevice<uint8_t> dropout_mask(problem.dropout_mask());
      const OnDevice<float> sums(poisoned<float>(problem.sums())), shrunk(poisoned<float>(problem.shrunk()));
      const lora_outer::Arguments args =
          problem.arguments(activation.get(), rank_factor.get(), lora_B.get(), dropout_mask.get(), sums.get(), shrunk.get());
      check(problem.shrinks ? lora_outer::launch_sm80<T, true>(args, nullptr)
                            : lora_outer::launch_sm80<T, false>(args, nullptr),
            "launching outer_sm80");
      check(cudaDeviceSynchronize(), "outer_sm80");
      report("outer_sm80<" + dtype + ">, " + problem.text(), problem.complaint(sums.host(), shrunk.host()));
    }
  }
}

// The pass that may start before the GEMM has ended: both as they are alone, and what follows in the stream finds them done.
template <typename T>
void beside(const std::string& dtype, int processors) {
  const Problem<T> problem({300, 520, 2000, 100, false, true, false});
  const OuterProblem<T> pass(1000, 264, 16, 3, false, 2, true, 4);
  const OnDevice<T> activation(pass.activation_values()), rank_factor(pass.rank_factor_values());
  const OnDevice<uint8_t> dropout_mask(pass.dropout_mask());
  const auto with_pass = [&](const std::string& name, const auto& launch) {
    const OnDevice<float> sums(poisoned<float>(pass.sums()));
    const OnDevice<T> copy(poisoned<T>(problem.size()));
    gemm(problem, name + ", with a pass beside it", [&](const lora_gemm::Arguments& args) {
      check(launch(args), name.c_str());
      check(lora_outer::launch_sm80<T, false>(
                pass.arguments(activation.get(), rank_factor.get(), nullptr, dropout_mask.get(), sums.get(), nullptr), nullptr, true),
            "launching outer_sm80 beside it");
      return cudaMemcpyAsync(copy.get(), args.out, problem.size() * sizeof(T), cudaMemcpyDeviceToDevice, nullptr);
    });
    report("outer_sm80<" + dtype + ">, beside " + name, pass.complaint(sums.host(), {}));
    report(name + ", copied behind the pass beside it", problem.complaint(copy.host()));
  };
  for (const auto& [tile, name] : {std::pair{TileName::kBoxWide, "BoxWide>"}, {TileName::kBoxSquare, "BoxSquare>"}}) {
    with_pass("gemm_sm90<" + dtype + ", " + name, [&, tile = tile](const lora_gemm::Arguments& args) {
      return lora_gemm::launch_sm90<T, false>(args, tile, processors, nullptr);
    });
  }
  with_pass("gemm_sm80<" + dtype + ", Wide>", [](const lora_gemm::Arguments& args) {
    return lora_gemm::launch_sm80<T, false>(args, TileName::kWide, nullptr);
  });
}

template <typename T>
void gathered(const std::string& dtype, int processors, bool boxes) {
  using namespace sparse_gathered;
  for (const GatheredProblem<T>& problem : gathereds<T>()) {
    const OnDevice<T> dy(problem.dy()), x(problem.x());
    const OnDevice<uint8_t> starts(problem.starts()), held(problem.held());
    const auto run = [&](const std::string& name, const auto& launch) {
      const OnDevice<int32_t> begins(poisoned<int32_t>(problem.begins()));
      const OnDevice<float> partials(poisoned<float>(problem.partials()));
      const Arguments args =
          problem.arguments(dy.get(), x.get(), starts.get(), held.get(), begins.get(), partials.get());
      if (args.entries.starts != nullptr) {
        check(launch_begins(args.entries, begins.get(), nullptr), "launching begins_kernel");
      }
      check(launch(args), ("launching " + name).c_str());
      check(cudaDeviceSynchronize(), name.c_str());
      report(name + ", " + problem.text(), problem.complaint(partials.host()));
    };
    run("gathered_sm80<" + dtype + ">", [](const Arguments& args) { return launch_sm80<T>(args, nullptr); });
    if (!boxes) continue;
    for (const int some : {processors, 2}) {
      run("gathered_sm90<" + dtype + ", BoxWide>",
          [&](const Arguments& args) { return launch_sm90<T, BoxWide>(args, some, nullptr); });
      run("gathered_sm90<" + dtype + ", BoxSquare>",
          [&](const Arguments& args) { return launch_sm90<T, BoxSquare>(args, some, nullptr); });
    }
  }
}

void masks() {
  for (const MaskProblem& problem : mask_problems()) {
    const OnDevice<int64_t> seed(std::vector<int64_t>{MaskProblem::kSeed});
    const OnDevice<uint8_t> mask(poisoned<uint8_t>(problem.numel()));
    const dropout::Arguments args = problem.arguments(seed.get(), mask.get());
    constexpr int kPerBlock = dropout::kThreads * dropout::kBytes;
    dropout::draw_mask_kernel<<<(args.numel + kPerBlock - 1) / kPerBlock, dropout::kThreads>>>(args);
    check(cudaGetLastError(), "launching draw_mask");
    check(cudaDeviceSynchronize(), "draw_mask");
    report("draw_mask", mask.host() == problem.expected() ? "" : "other bits than the host's");
  }
}

template <typename Out, int kWidth>
void reduce(const char* name) {
  const std::vector<Reduction<Out>> problems = reductions<Out>();
  std::deque<OnDevice<float>> inputs;
  std::deque<OnDevice<Out>> outs;
  reduction::Arguments args{};
  int blocks = 0;
  for (const Reduction<Out>& problem : problems) {
    const OnDevice<float>& values = inputs.emplace_back(problem.values);
    const OnDevice<float>& row_scale = inputs.emplace_back(problem.row_scale);
    const OnDevice<Out>& out = outs.emplace_back(poisoned<Out>(problem.numel()));
    blocks = append<kWidth>(args, problem.sum(values.get(), row_scale.get(), out.get()));
  }
  reduction::kernel<Out, kWidth><<<blocks, reduction::kThreads>>>(args);
  check(cudaGetLastError(), "launching reduce_partials");
  check(cudaDeviceSynchronize(), "reduce_partials");
  for (size_t j = 0; j < problems.size(); ++j) {
    report(std::string("reduce_partials<") + name + ">", problems[j].complaint(outs[j].host()));
  }
}

}  // namespace
}  // namespace peft_kernels::selftest

// With the argument "small" without the large problems, which take compute-sanitizer minutes.
int main(int count, char** arguments) {
  using namespace peft_kernels::selftest;
  const bool large = count < 2 || arguments[1] != std::string("small");
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no GPU\n");
    return 77;
  }
  masks();
  reduce<float, 4>("float, 4");
  reduce<float, 1>("float, 1");
  reduce<__half, 4>("half, 4");
  reduce<__half, 1>("half, 1");
  reduce<__nv_bfloat16, 4>("bfloat16, 4");
  reduce<__nv_bfloat16, 1>("bfloat16, 1");
  shrink<__nv_bfloat16>("bfloat16");
  shrink<__half>("float16");
  outer<__nv_bfloat16>("bfloat16");
  outer<__half>("float16");
  gemms<__nv_bfloat16>("bfloat16", large);
  gemms<__half>("float16", large);
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  const bool boxes = properties.major == 9 && properties.minor == 0;
  const int processors = properties.multiProcessorCount;
  if (boxes) {
    box_gemms<__nv_bfloat16>("bfloat16", processors, large);
    box_gemms<__half>("float16", processors, large);
    forward<__nv_bfloat16>("bfloat16", processors, large);
    forward<__half>("float16", processors, large);
    beside<__nv_bfloat16>("bfloat16", processors);
    beside<__half>("float16", processors);
  }
  gathered<__nv_bfloat16>("bfloat16", processors, boxes);
  gathered<__half>("float16", processors, boxes);
  return finish();
}
