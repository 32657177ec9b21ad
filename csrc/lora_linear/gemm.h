// A GEMM with a low-rank product added in the same accumulators (KERNELS: "K-extension"):
//
//   out = left·right + keep∘(low_left·low_right) + bias
//
// forward  y  = x·Wᵀ + S·Bᵀ + bias                    right and low_right by feature: W [N, K], B [N, R]
// backward dx = dy·W + D(dH·A)                        right and low_right by depth:   W [N, K], A [R, K]
//
// The low-rank product comes first: `keep` masks it in registers before the large one is accumulated onto it.
#pragma once

#include "common/tiles.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace peft_kernels::lora_gemm {

// Sizes in elements. Operands are of 16 bits, their rows of unit stride, start and pitch multiples of 8 elements.
struct Arguments {
  const void* left;        // [rows, depth]
  int64_t left_pitch;      // from one row to the next
  const void* right;       // [columns, depth], or [depth, columns]
  int64_t right_pitch;
  const void* low_left;    // [rows, rank]
  int64_t low_left_pitch;
  const void* low_right;   // [columns, rank], or [rank, columns]
  int64_t low_right_pitch;
  const uint8_t* keep;     // [rows, ceil(columns / 8)], a bit an element as dropout's mask has it, or null
  const void* bias;        // [columns], or null
  void* out;               // [rows, columns], contiguous, starting on 16 bytes
  int rows, columns, depth, rank;
  // Where there are few tiles, the small ones: out is the sum of partials float32 [parts, rows, columns], each over `part`
  // of the depth but for the last; the low-rank product and the bias are in the first. Otherwise null and 1.
  float* partials;
  int parts, part;
};

// By the kernels for sm_90a, on the current device of `processors` SMs: compute capability 9.0 and a library built for it. rows,
// columns and depth are at least 1, columns a multiple of 8 (gemm_sm90.cuh).
template <typename T, bool kByFeature>
cudaError_t launch_sm90(const Arguments& args, TileName tile, int processors, cudaStream_t stream);

}  // namespace peft_kernels::lora_gemm
