// The whole forward without dropout as one kernel, for sm_90a:
//
//   S = scale·row_scale∘(x·Aᵀ)      y = x·Wᵀ + S·Bᵀ + bias
//
// S is computed beside the first tile of its rows from the same tiles of x, so that no pass over x is made for it.
#pragma once

#include "common/status.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace peft_kernels::lora_forward {

constexpr int kMostRanks = 64;

// Sizes in elements: M rows, N columns, K K, R rank. Operands are of 16 bits, their rows of unit stride, start and pitch
// multiples of 8 elements.
struct Operand {
  const void* start;
  int64_t pitch;  // from one row to the next
};

struct Arguments {
  Operand x, weight, lora_A, lora_B;  // [M, K], [N, K], [R, K], [N, R]
  const void* bias;                   // [N], or null
  const float* row_scale;             // [M], or null
  float scale;
  void* y;  // [M, N], contiguous, starting on 16 bytes
  void* s;  // [M, R filled up to a multiple of 8 by zeros], contiguous
  int rows, columns, K, rank;
};

// On the current device, of `processors` SMs: compute capability 9.0 and a library built for it. All sizes are at least 1,
// columns a multiple of 8, rank at most kMostRanks (forward_sm90_launch.h).
template <typename T>
Status launch_sm90(const Arguments& args, int processors, cudaStream_t stream);

}  // namespace peft_kernels::lora_forward
