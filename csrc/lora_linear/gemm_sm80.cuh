// The GEMM's kernels for sm_80 and later, and their launch. No torch: the self-test launches them too.
#pragma once

#include "lora_linear/gemm_sm80.h"

#include <cuda_runtime.h>

namespace peft_kernels::lora_gemm {

template <typename T, typename Tile, bool kByFeature>
PEFT_KERNELS_GLOBAL(Tile::kThreads) gemm_sm80(const Arguments args) {
  extern __shared__ __align__(128) char shared[];
  Gemm<T, Tile, kByFeature>::run(args, shared);
}

// On the current device. rows and columns are at least 1.
template <typename T, typename Tile, bool kByFeature>
cudaError_t launch_sm80(const Arguments& args, cudaStream_t stream) {
  constexpr int kSharedBytes = Gemm<T, Tile, kByFeature>::kSharedBytes;
  const auto kernel = &gemm_sm80<T, Tile, kByFeature>;
  // Asked at every launch: the limit is each device's own, and the call costs less than to remember where it was made.
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  const int blocks = tiles_of(args.rows, Tile::kRows) * tiles_of(args.columns, Tile::kColumns);
  kernel<<<blocks, Tile::kThreads, kSharedBytes, stream>>>(args);
  return cudaGetLastError();
}

template <typename T, bool kByFeature>
cudaError_t launch_sm80(const Arguments& args, TileName tile, cudaStream_t stream) {
  switch (tile) {
    case TileName::kWide:
      return launch_sm80<T, Wide, kByFeature>(args, stream);
    case TileName::kSquare:
      return launch_sm80<T, Square, kByFeature>(args, stream);
    default:
      return launch_sm80<T, Small, kByFeature>(args, stream);
  }
}

}  // namespace peft_kernels::lora_gemm
