// The GEMM's kernels for sm_80 and later, and their launch. No torch: the self-test launches them too.
#pragma once

#include "common/launch_shared.h"
#include "ops/lora_linear/gemm_sm80.cuh"

namespace peft_kernels::lora_gemm {

template <typename T, typename Tile, bool kByFeature>
PEFT_KERNELS_GLOBAL(Tile::kThreads) gemm_sm80(const __grid_constant__ Arguments args) {
  extern __shared__ __align__(128) char shared[];
  Gemm<T, Tile, kByFeature>::run(args, shared);
}

// On the current device. rows and columns are at least 1.
template <typename T, typename Tile, bool kByFeature>
cudaError_t launch_sm80(const Arguments& args, cudaStream_t stream) {
  const int64_t tiles = static_cast<int64_t>(tiles_of(args.rows, Tile::kRows)) * tiles_of(args.columns, Tile::kColumns);
  const int64_t blocks = Gemm<T, Tile, kByFeature>::kSplits ? tiles * args.parts : tiles;
  return launch_shared(&gemm_sm80<T, Tile, kByFeature>, blocks, Tile::kThreads, Gemm<T, Tile, kByFeature>::kSharedBytes,
                       args, stream);
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
