// A launch with more shared memory than a block has unasked. No torch: the self-test launches by it too.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace peft_kernels {

// On the current device. `blocks` fit a grid, and are a multiple of `cluster`, the blocks that run together. `beside`: the
// kernel may start before the one before it in the stream has ended (grid_dependency.cuh says when that is right; sm_90).
template <typename Arguments>
cudaError_t launch_shared(void (*kernel)(Arguments), int64_t blocks, int threads, int shared_bytes,
                          const Arguments& args, cudaStream_t stream, int cluster = 1, bool beside = false) {
  // Asked at every launch: the limit is each device's own, and the call costs less than to remember where it was made.
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  if (beside) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t launch{};
  launch.gridDim = static_cast<unsigned>(blocks);
  launch.blockDim = static_cast<unsigned>(threads);
  launch.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  launch.stream = stream;
  launch.attrs = attributes;
  launch.numAttrs = count;
  return cudaLaunchKernelEx(&launch, kernel, args);
}

}  // namespace peft_kernels
