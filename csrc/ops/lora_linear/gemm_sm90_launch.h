// The GEMM's kernels for sm_90a, and their launch. No torch: the self-test launches them too.
#pragma once

#include "common/launch_shared.h"
#include "common/tensor_map.h"
#include "ops/lora_linear/gemm.h"
#include "ops/lora_linear/gemm_sm90.cuh"

#include <algorithm>

namespace peft_kernels::lora_gemm {

// The code is sm_90a's only. Elsewhere no one launches it; were it loaded from PTX all the same, it would be an error.
template <typename T, typename Tile, bool kByFeature>
__global__ void __launch_bounds__(BoxGemm<T, Tile, kByFeature>::kThreads, 1)
    gemm_sm90(const __grid_constant__ BoxArguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char boxes[];
  BoxGemm<T, Tile, kByFeature>::run(args, boxes);
#else
  __trap();
#endif
}

template <typename T, typename Tile, bool kByFeature>
Status launch_sm90(const Arguments& args, int processors, cudaStream_t stream) {
  using Gemm = BoxGemm<T, Tile, kByFeature>;
  using Product = typename Gemm::Product;
  BoxArguments boxes{};
  boxes.pairs = args.pairs, boxes.masks = args.masks, boxes.bias = args.bias;
  std::copy_n(args.dropout_mask, kMostPairs, boxes.dropout_mask);
  boxes.rows = args.rows, boxes.columns = args.columns;
  boxes.partials = args.partials, boxes.parts = args.parts, boxes.part = args.part;
  Status status = cudaSuccess;
  if (args.out != nullptr) status = encode(&boxes.out, args.out, args.columns, args.rows, args.columns, Product::kGroupRows);
  const auto add = [&](BoxPair& to, const Pair& pair) {
    to.K = pair.K;
    if (pair.K == 0 || !status.ok()) return;
    status = encode(&to.left, pair.left, pair.left_pitch, args.rows, pair.K, Product::kLeftBox);
    if (!status.ok()) return;
    status = encode(&to.right, pair.right, pair.right_pitch, kByFeature ? args.columns : pair.K,
                    kByFeature ? pair.K : args.columns, Product::kRightBox);
  };
  for (int j = 0; j < args.pairs; ++j) add(boxes.low[j], args.low[j]), add(boxes.base[j], args.base[j]);
  if (!status.ok()) return status;
  const int64_t work = Product::clusters_of(args.rows, args.columns) * args.parts;
  const int64_t clusters = std::min<int64_t>(work, processors / Tile::kCluster);
  return launch_shared(&gemm_sm90<T, Tile, kByFeature>, clusters * Tile::kCluster, Gemm::kThreads, Gemm::kSharedBytes,
                       boxes, stream, Tile::kCluster);
}

template <typename T, bool kByFeature>
Status launch_sm90(const Arguments& args, TileName tile, int processors, cudaStream_t stream) {
  return tile == TileName::kBoxWide ? launch_sm90<T, BoxWide, kByFeature>(args, processors, stream)
                                    : launch_sm90<T, BoxSquare, kByFeature>(args, processors, stream);
}

}  // namespace peft_kernels::lora_gemm
