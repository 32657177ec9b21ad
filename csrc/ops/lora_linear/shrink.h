// One pass over the rows of x or dy for the few columns of a low-rank product, in split-K slices that reduce_partials adds up:
//
//   partials[p] = D(activation)·rank_factor    over the p-th slice of K
//
// forward  S of D(x)·Aᵀ   rank_factor by feature: A of all projections that share x, [streams·width, K]
// backward dH of dy·B     rank_factor by K:   B [N, R], no mask
//
// With dropout a stream (a projection) has its own mask, drawn here and stored, a bit an element (dropout.py has the
// contract); what is kept is not rescaled, that is reduce_partials's.
#pragma once

#include <cstdint>

namespace peft_kernels::lora_shrink {

// Sizes in elements. Operands are of 16 bits, their rows of unit stride, start and pitch multiples of 8 elements.
struct Arguments {
  const void* activation;    // [rows, K]
  int64_t activation_pitch;  // from one row to the next
  const void* rank_factor;  // [streams * width, K], or [K, width]
  int64_t rank_factor_pitch;
  float* partials;      // [splits, rows, streams * width], contiguous
  const int64_t* seed;  // of dropout, or null
  uint8_t* mask;        // [streams, rows, ceil(K / 8)], or null: to be drawn, not to be stored
  int32_t threshold;    // the draw from which on an element is kept
  int rows, K, width, streams, splits;
  int part;  // of K, a multiple of kBlockK
};

}  // namespace peft_kernels::lora_shrink
