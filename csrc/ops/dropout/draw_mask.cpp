// The packed mask of dropout on the host: the CPU's dropout, and the proof of the bits that the GPU draws.

#include "ops/dropout/draw_mask.h"

#include "common/host_simd.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

namespace peft_kernels::dropout {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBytesPerTask = 2048;  // a thread's least share: some 30 µs

PEFT_KERNELS_FOR_EACH_CPU void draw_row(uint64_t seed, int64_t row, uint32_t stream, int32_t threshold, int64_t groups,
                                        uint8_t* mask) {
  for (int64_t group = 0; group < groups; ++group) {
    mask[group] = kept_byte(seed, row, static_cast<uint32_t>(group), stream, threshold);
  }
}

Tensor draw_mask(const Tensor& seed, int64_t rows, int64_t columns, int64_t threshold, int64_t streams) {
  Tensor mask = empty_mask(seed, rows, columns, threshold, streams);
  const Arguments args = arguments(seed, mask, threshold);
  if (args.numel == 0) return mask;
  const uint64_t drawn = static_cast<uint64_t>(*args.seed);
  const int64_t grain = std::max<int64_t>(1, kBytesPerTask / args.groups);
  torch::stable::parallel_for(0, streams * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      draw_row(drawn, line % rows, static_cast<uint32_t>(line / rows), args.threshold, args.groups,
               args.mask + line * args.groups);
    }
  });
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_native, CPU, m) { m.impl("draw_mask", TORCH_BOX(&draw_mask)); }

}  // namespace peft_kernels::dropout
