// Device code of split_reduce: for every architecture, bound by the bandwidth of reading the partials once.
#pragma once

#include "common/kernel_source.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace peft_kernels::reduction {

constexpr int kThreads = 256;
constexpr int kVector = 4;  // float32 values in one 16-byte load

struct Arguments {
  const float* partials;   // [P, M, R], each [M, R] contiguous
  int64_t stride_p;        // from one partial to the next, in values
  int64_t num_partials;    // P
  const float* row_scale;  // [M] or null
  float scale;
  int64_t numel;  // M * R
  int64_t rank;   // R
  void* out;      // [M, R]
};

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

// kWidth neighbours of [M, R], from `first` on. The sum runs over p in ascending order, whatever the launch: the
// same partials give the same bits.
template <typename Out, int kWidth>
PEFT_KERNELS_DEVICE void reduce_pack(const Arguments& args, int64_t first) {
  float sum[kWidth] = {};
  const float* source = args.partials + first;
  PEFT_KERNELS_UNROLL_BY_4  // loads of several partials in flight; the additions stay in order
  for (int64_t p = 0; p < args.num_partials; ++p, source += args.stride_p) {
    const auto pack = *reinterpret_cast<const Pack<float, kWidth>*>(source);
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < kWidth; ++i) sum[i] += pack.values[i];
  }

  // A pack may cross rows: R need not be a multiple of kWidth.
  int64_t row = 0, column = 0;
  if (args.row_scale != nullptr) {
    row = first / args.rank;
    column = first - row * args.rank;
  }
  Pack<Out, kWidth> result;
  PEFT_KERNELS_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    float factor = args.scale;
    if (args.row_scale != nullptr) {
      factor *= args.row_scale[row];
      if (++column == args.rank) column = 0, ++row;
    }
    result.values[i] = static_cast<Out>(sum[i] * factor);  // rounds to nearest, once
  }
  *reinterpret_cast<Pack<Out, kWidth>*>(static_cast<Out*>(args.out) + first) = result;
}

// One thread a pack, then one thread for each value that is left over.
template <typename Out, int kWidth>
PEFT_KERNELS_GLOBAL(kThreads) kernel(const Arguments args) {
  const int64_t thread = static_cast<int64_t>(block_index()) * kThreads + thread_index();
  const int64_t packs = args.numel / kWidth;
  if (thread < packs) {
    reduce_pack<Out, kWidth>(args, thread * kWidth);
  } else if (const int64_t rest = packs * kWidth + (thread - packs); rest < args.numel) {
    reduce_pack<Out, 1>(args, rest);
  }
}

}  // namespace peft_kernels::reduction
