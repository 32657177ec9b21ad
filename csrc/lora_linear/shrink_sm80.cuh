// The shrink's kernels for sm_80 and later, and their launch. No torch: the self-test launches them too.
#pragma once

#include "lora_linear/shrink_sm80.h"

#include <cuda_runtime.h>

namespace peft_kernels::lora_shrink {

template <typename T, int kColumns, bool kByFeature>
PEFT_KERNELS_GLOBAL(kThreads) shrink_sm80(const Arguments args) {
  extern __shared__ __align__(128) char shared[];
  Shrink<T, kColumns, kByFeature>::run(args, shared);
}

// On the current device. There is at least one row, one column, and one element of depth.
template <typename T, int kColumns, bool kByFeature>
cudaError_t launch_sm80(const Arguments& args, cudaStream_t stream) {
  constexpr int kSharedBytes = Shrink<T, kColumns, kByFeature>::kSharedBytes;
  const auto kernel = &shrink_sm80<T, kColumns, kByFeature>;
  // Asked at every launch: the limit is each device's own, and the call costs less than to remember where it was made.
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  kernel<<<static_cast<unsigned>(blocks_of<kColumns>(args)), kThreads, kSharedBytes, stream>>>(args);
  return cudaGetLastError();
}

// As wide as the rank asks for: `wide` is read once for up to 64 columns.
template <typename T, bool kByFeature>
cudaError_t launch_sm80(const Arguments& args, cudaStream_t stream) {
  if (args.width <= 16) return launch_sm80<T, 16, kByFeature>(args, stream);
  if (args.width <= 32) return launch_sm80<T, 32, kByFeature>(args, stream);
  return launch_sm80<T, 64, kByFeature>(args, stream);
}

}  // namespace peft_kernels::lora_shrink
