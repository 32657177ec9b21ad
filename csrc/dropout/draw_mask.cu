// The packed mask of dropout by CUDA: 16 bytes a thread, 128 draws. Bound by Philox's integer multiplications (two of
// 32 x 32 -> 64 bits a round and byte), not by the bytes it writes.

#include "dropout/draw_mask.h"

#include "common/kernel_table.h"
#include "common/launch.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

namespace peft_kernels::dropout {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kBytes = 16;  // of a thread: one store

struct alignas(kBytes) Pack {
  uint8_t values[kBytes];
};

__global__ void __launch_bounds__(kThreads) draw_mask_kernel(const Arguments args) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kBytes;
  if (first >= args.numel) return;
  const uint64_t seed = static_cast<uint64_t>(*args.seed);
  const int64_t line = first / args.groups;  // of [streams * rows]
  int64_t group = first - line * args.groups, stream = line / args.rows, row = line - stream * args.rows;
  Pack pack;
#pragma unroll
  for (int i = 0; i < kBytes; ++i) {
    pack.values[i] =
        kept_byte(seed, row, static_cast<uint32_t>(group), static_cast<uint32_t>(stream), args.threshold);
    if (++group == args.groups) {
      group = 0;
      if (++row == args.rows) row = 0, ++stream;
    }
  }
  if (first + kBytes <= args.numel) {
    *reinterpret_cast<Pack*>(args.mask + first) = pack;  // aligned: a fresh mask, and a multiple of 16
    return;
  }
#pragma unroll
  for (int i = 0; i < kBytes; ++i) {
    if (first + i < args.numel) args.mask[first + i] = pack.values[i];
  }
}

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
