// A launch with more shared memory than a block has unasked. No torch: the self-test launches by it too.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace peft_kernels {

// On the current device. `blocks` fit a grid.
template <typename Arguments>
cudaError_t launch_shared(void (*kernel)(Arguments), int64_t blocks, int threads, int shared_bytes,
                          const Arguments& args, cudaStream_t stream) {
  // Asked at every launch: the limit is each device's own, and the call costs less than to remember where it was made.
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace peft_kernels
