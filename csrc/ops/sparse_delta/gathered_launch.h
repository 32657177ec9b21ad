// The kernels of the gradient of entries, and their launch. No torch: the self-test launches them too.
#pragma once

#include "common/launch_shared.h"
#include "common/tensor_map.h"
#include "ops/sparse_delta/gathered_sm80.cuh"
#include "ops/sparse_delta/gathered_sm90.cuh"

#include <algorithm>

namespace peft_kernels::sparse_gathered {

constexpr int kThreads = 256;  // of the kernel that finds where chunks begin

PEFT_KERNELS_GLOBAL(kThreads) begins_kernel(const Entries entries, int32_t* begins) {
  find_begin(entries, begins, static_cast<int64_t>(block_index()) * kThreads + thread_index());
}

template <typename T>
PEFT_KERNELS_GLOBAL(Gathered<T>::kThreads) gathered_sm80(const Arguments args) {
  extern __shared__ __align__(128) char shared[];
  Gathered<T>::run(args, shared);
}

// The code is sm_90a's only. Elsewhere no one launches it; were it loaded from PTX all the same, it would be an error.
template <typename T, typename Tile>
__global__ void __launch_bounds__(BoxGathered<T, Tile>::kThreads, 1)
    gathered_sm90(const __grid_constant__ BoxArguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char boxes[];
  BoxGathered<T, Tile>::run(args, boxes);
#else
  __trap();
#endif
}

// Writes `begins`, which `entries` may name. On the current device, as what follows.
inline cudaError_t launch_begins(const Entries& entries, int32_t* begins, cudaStream_t stream) {
  const int64_t items = static_cast<int64_t>(entries.rows) * (entries.chunks + 1);
  begins_kernel<<<static_cast<unsigned>((items + kThreads - 1) / kThreads), kThreads, 0, stream>>>(entries, begins);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_sm80(const Arguments& args, cudaStream_t stream) {
  using Kernel = Gathered<T>;
  return launch_shared(&gathered_sm80<T>, Kernel::blocks_of(args), Kernel::kThreads, Kernel::kSharedBytes, args, stream);
}

// On compute capability 9.0, of `processors` SMs.
template <typename T, typename Tile>
Status launch_sm90(const Arguments& args, int processors, cudaStream_t stream) {
  using Kernel = BoxGathered<T, Tile>;
  using Product = typename Kernel::Product;
  BoxArguments boxes{{}, {}, args};
  Status status = encode(&boxes.dy, args.dy, args.dy_pitch, args.tokens, args.entries.rows, Product::kLeftBox);
  if (status.ok()) {
    status = encode(&boxes.x, args.x, args.x_pitch, args.tokens, args.entries.width, Product::kRightBox);
  }
  if (!status.ok()) return status;
  const int64_t work = Product::clusters_of(args.entries.rows, args.entries.width) * args.parts;
  return launch_shared(&gathered_sm90<T, Tile>, std::min<int64_t>(work, processors / Tile::kCluster) * Tile::kCluster,
                       Kernel::kThreads, Kernel::kSharedBytes, boxes, stream, Tile::kCluster);
}

}  // namespace peft_kernels::sparse_gathered
