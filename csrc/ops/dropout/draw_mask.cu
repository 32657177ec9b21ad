// The packed mask of dropout by CUDA.

#include "ops/dropout/draw_mask_kernel.cuh"
#include "ops/dropout/draw_mask.h"

#include "common/kernel_table.h"
#include "common/launch.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

namespace peft_kernels::dropout {
namespace {

using torch::stable::Tensor;

const KernelEntry kEntry{"draw_mask", reinterpret_cast<const void*>(&draw_mask_kernel)};

Tensor draw_mask(const Tensor& seed, int64_t rows, int64_t columns, int64_t threshold, int64_t streams) {
  const torch::stable::accelerator::DeviceGuard guard(seed.get_device_index());
  Tensor mask = empty_mask(seed, rows, columns, threshold, streams);
  const Arguments args = arguments(seed, mask, threshold);
  if (args.numel == 0) return mask;
  const cudaStream_t stream = current_stream(seed.get_device_index());
  draw_mask_kernel<<<blocks_for(args.numel, kThreads * kBytes), kThreads, 0, stream>>>(args);
  check_cuda(cudaGetLastError(), "launching draw_mask");
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_native, CUDA, m) { m.impl("draw_mask", TORCH_BOX(&draw_mask)); }

}  // namespace peft_kernels::dropout
