// Device code of draw_mask: 16 bytes a thread, 128 draws. Bound by Philox's integer multiplications (two of 32 x 32 -> 64
// bits a round and byte), not by the bytes it writes.
#pragma once

#include "common/kernel_source.cuh"
#include "ops/dropout/arguments.h"

#include <cstdint>

namespace peft_kernels::dropout {

constexpr int kThreads = 256;
constexpr int kBytes = 16;  // of a thread: one store

struct alignas(kBytes) Pack {
  uint8_t values[kBytes];
};

PEFT_KERNELS_GLOBAL(kThreads) draw_mask_kernel(const Arguments args) {
  const int64_t first = (static_cast<int64_t>(block_index()) * kThreads + thread_index()) * kBytes;
  if (first >= args.numel) return;
  const uint64_t seed = static_cast<uint64_t>(*args.seed);
  const int64_t line = first / args.groups;  // of [streams * rows]
  int64_t group = first - line * args.groups, stream = line / args.rows, row = line - stream * args.rows;
  Pack pack;
  PEFT_KERNELS_UNROLL
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
  PEFT_KERNELS_UNROLL
  for (int i = 0; i < kBytes; ++i) {
    if (first + i < args.numel) args.mask[first + i] = pack.values[i];
  }
}

}  // namespace peft_kernels::dropout
