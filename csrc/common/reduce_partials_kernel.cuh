// Device code of reduce_partials: for every architecture, bound by the bandwidth of reading the partials once.
#pragma once

#include "common/host_device.h"
#include "common/kernel_source.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace peft_kernels::reduction {

constexpr int kThreads = 256;
constexpr int kVector = 4;  // float32 values in one 16-byte load

constexpr int kMostSums = 8;  // of a launch

struct Sum {
  const float* partials;   // [P, M, R], rows `pitch` apart: R, or of packs that do not cross rows more
  int64_t stride_p;        // from one partial to the next, in values
  int64_t num_partials;    // P
  int64_t pitch;
  const float* row_scale;  // [M] or null
  float scale;
  int64_t numel;  // M * R
  int64_t rank;   // R
  void* out;      // [M, R]
};

// Several, one after another: the threads of sum j end at ends[j].
struct Arguments {
  Sum sums[kMostSums];
  int64_t ends[kMostSums];
  int count;
};

// A thread a pack, then one for each value that is left over.
template <int kWidth>
PEFT_KERNELS_HOST_DEVICE int64_t threads_of(const Sum& sum) {
  return sum.numel / kWidth + sum.numel % kWidth;
}

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

// kWidth neighbours of [M, R], from `first` on. The sum runs over p in ascending order, whatever the launch: the
// same partials give the same bits.
template <typename Out, int kWidth>
PEFT_KERNELS_DEVICE void reduce_pack(const Sum& of, int64_t first) {
  float factor[kWidth];  // loaded ahead of the sums
  PEFT_KERNELS_UNROLL
  for (int i = 0; i < kWidth; ++i) factor[i] = of.scale;
  if (of.row_scale != nullptr) {  // a pack may cross rows: R need not be a multiple of kWidth
    int64_t row = first / of.rank, column = first - row * of.rank;
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      factor[i] *= of.row_scale[row];
      if (++column == of.rank) column = 0, ++row;
    }
  }

  float sum[kWidth] = {};
  const float* source = of.partials + (of.pitch == of.rank ? first : first / of.rank * of.pitch + first % of.rank);
  PEFT_KERNELS_UNROLL_BY_4  // loads of several partials in flight; the additions stay in order
  for (int64_t p = 0; p < of.num_partials; ++p, source += of.stride_p) {
    const auto pack = *reinterpret_cast<const Pack<float, kWidth>*>(source);
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < kWidth; ++i) sum[i] += pack.values[i];
  }

  Pack<Out, kWidth> result;
  PEFT_KERNELS_UNROLL
  for (int i = 0; i < kWidth; ++i) result.values[i] = static_cast<Out>(sum[i] * factor[i]);  // rounds to nearest, once
  *reinterpret_cast<Pack<Out, kWidth>*>(static_cast<Out*>(of.out) + first) = result;
}

template <typename Out, int kWidth>
PEFT_KERNELS_GLOBAL(kThreads) kernel(const Arguments args) {
  int64_t thread = static_cast<int64_t>(block_index()) * kThreads + thread_index();
  int j = 0;
  while (j < args.count && thread >= args.ends[j]) ++j;
  if (j == args.count) return;
  const Sum& sum = args.sums[j];
  if (j > 0) thread -= args.ends[j - 1];
  const int64_t packs = sum.numel / kWidth;
  if (thread < packs) {
    reduce_pack<Out, kWidth>(sum, thread * kWidth);
  } else {
    reduce_pack<Out, 1>(sum, packs * kWidth + (thread - packs));
  }
}

}  // namespace peft_kernels::reduction
