// The kernels of the forward as one kernel, and their launch. No torch: the self-test launches them too.
#pragma once

#include "common/launch_shared.h"
#include "common/tensor_map.h"
#include "ops/lora_linear/forward.h"
#include "ops/lora_linear/forward_sm90.cuh"

#include <algorithm>

namespace peft_kernels::lora_forward {

// The code is sm_90a's only. Elsewhere no one launches it; were it loaded from PTX all the same, it would be an error.
template <typename T, int kRanks>
__global__ void __launch_bounds__(BoxForward<T, kRanks>::kThreads, 1)
    forward_sm90(const __grid_constant__ BoxArguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char boxes[];
  BoxForward<T, kRanks>::run(args, boxes);
#else
  __trap();
#endif
}

template <typename T, int kRanks>
Status launch_ranks(const Arguments& args, int processors, cudaStream_t stream) {
  using Forward = BoxForward<T, kRanks>;
  using Product = typename Forward::Product;
  BoxArguments boxes{};
  boxes.bias = args.bias, boxes.row_scale = args.row_scale, boxes.scale = args.scale, boxes.s = args.s;
  boxes.rows = args.rows, boxes.columns = args.columns, boxes.K = args.K, boxes.rank = args.rank;
  Status status = encode(&boxes.y, args.y, args.columns, args.rows, args.columns, Product::kGroupRows);
  const auto add = [&](CUtensorMap& map, const Operand& operand, int height, int width, int box) {
    if (status.ok()) status = encode(&map, operand.start, operand.pitch, height, width, box);
  };
  add(boxes.x, args.x, args.rows, args.K, Product::kLeftBox);
  add(boxes.weight, args.weight, args.columns, args.K, Product::kRightBox);
  add(boxes.lora_A, args.lora_A, args.rank, args.K, kRanks);
  add(boxes.lora_B, args.lora_B, args.columns, args.rank, Product::kRightBox);
  if (!status.ok()) return status;
  const int64_t tiles = Product::clusters_of(args.rows, args.columns);
  const int64_t most = std::min<int64_t>(tiles, processors / BoxWide::kCluster);
  boxes.per_cluster = static_cast<int>((tiles + most - 1) / most);
  const int64_t clusters = (tiles + boxes.per_cluster - 1) / boxes.per_cluster;
  return launch_shared(&forward_sm90<T, kRanks>, clusters * BoxWide::kCluster, Forward::kThreads, Forward::kSharedBytes,
                       boxes, stream, BoxWide::kCluster);
}

template <typename T>
Status launch_sm90(const Arguments& args, int processors, cudaStream_t stream) {
  if (args.rank <= 16) return launch_ranks<T, 16>(args, processors, stream);
  return args.rank <= 32 ? launch_ranks<T, 32>(args, processors, stream) : launch_ranks<T, 64>(args, processors, stream);
}

}  // namespace peft_kernels::lora_forward
