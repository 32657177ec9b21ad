// The shrink's kernels for sm_80 and later, and their launch. No torch: the self-test launches them too.
#pragma once

#include "common/launch_shared.h"
#include "ops/lora_linear/shrink_sm80.cuh"

namespace peft_kernels::lora_shrink {

// Registers for three blocks an SM, as shared memory has on sm_80.
template <typename T, int kColumns, bool kByFeature>
PEFT_KERNELS_GLOBAL(kThreads, 3) shrink_sm80(const Arguments args) {
  extern __shared__ __align__(128) char shared[];
  Shrink<T, kColumns, kByFeature>::run(args, shared);
}

// On the current device. There is at least one row, one column, and one element of K.
template <typename T, int kColumns, bool kByFeature>
cudaError_t launch_sm80(const Arguments& args, cudaStream_t stream) {
  return launch_shared(&shrink_sm80<T, kColumns, kByFeature>, blocks_of<kColumns>(args), kThreads,
                       Shrink<T, kColumns, kByFeature>::kSharedBytes, args, stream);
}

template <typename T, bool kByFeature>
cudaError_t launch_sm80(const Arguments& args, cudaStream_t stream) {
  switch (columns_for(args.width)) {
    case 16:
      return launch_sm80<T, 16, kByFeature>(args, stream);
    case 32:
      return launch_sm80<T, 32, kByFeature>(args, stream);
    default:
      return launch_sm80<T, 64, kByFeature>(args, stream);
  }
}

}  // namespace peft_kernels::lora_shrink
