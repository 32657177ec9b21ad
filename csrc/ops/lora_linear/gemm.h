// A GEMM with a low-rank product added in the same accumulators ("K-extension"), over one pair of operands or several:
//
//   out = Σ_j left_j·right_j + Σ_j mask_j∘(low_left_j·low_right_j) + bias
//
// forward  y  = x·Wᵀ + S·Bᵀ + bias                    right and low_right by feature: W [N, K], B [N, R]
// backward dx = Σ_j dy_j·W_j + Σ_j D_j(dH_j·A_j)      right and low_right by K:   W [N, K], A [R, K]
//
// `mask_j` masks the low-rank products in registers: a few columns at a time, before they are added.
#pragma once

#include "common/kernel_source.cuh"
#include "common/status.h"
#include "gemm/tiles.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace peft_kernels::lora_gemm {

constexpr int kMostPairs = 3;  // of projections that share an input: q, k and v

// Sizes in elements. Operands are of 16 bits, their rows of unit stride, start and pitch multiples of 8 elements.
struct Pair {
  const void* left;   // [rows, K]
  int64_t left_pitch;  // from one row to the next
  const void* right;  // [columns, K], or [K, columns]
  int64_t right_pitch;
  int K;
};

struct Arguments {
  Pair low[kMostPairs], base[kMostPairs];  // of which `pairs` are there
  int pairs;
  // [rows, ceil(columns / 8)], a bit an element as dropout's mask has it: none, one for all pairs, or one a pair. They start on
  // any byte, as the bias does on any element; the four bytes that their last one is in are read, as memory is allocated.
  const uint8_t* dropout_mask[kMostPairs];
  int masks;
  const void* bias;     // [columns], or null
  void* out;            // [rows, columns], contiguous, starting on 16 bytes
  int rows, columns;
  // Where there are few tiles, of those that split: out is the sum of partials float32 [parts, rows, columns], each over
  // `part` stages of 64 but for the last; the low-rank products and the bias are in the first. Otherwise null and 1.
  float* partials;
  int parts, part;
};

// Which mask is a pair's.
PEFT_KERNELS_HOST_DEVICE int mask_of(int masks, int pair) { return masks > 1 ? pair : 0; }

// Stages of `stage` elements that all of `pairs` take.
PEFT_KERNELS_HOST_DEVICE int stages_of(const Pair* pairs, int count, int stage) {
  int stages = 0;
  for (int j = 0; j < count; ++j) stages += tiles_of(pairs[j].K, stage);
  return stages;
}

// By the kernels for sm_90a, on the current device of `processors` SMs: compute capability 9.0 and a library built for it. rows,
// columns and the first pair's K are at least 1, columns a multiple of 8 (gemm_sm90_launch.h).
template <typename T, bool kByFeature>
Status launch_sm90(const Arguments& args, TileName tile, int processors, cudaStream_t stream);

}  // namespace peft_kernels::lora_gemm
