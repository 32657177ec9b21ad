// One pass over wide rows for the few columns of a low-rank product, in parts that reduce_partials adds up:
//
//   partials[p] = D(wide)·narrow    over the p-th part of the depth
//
// forward  S of D(x)·Aᵀ   narrow by feature: A of all projections that share x, [streams·width, K]
// backward dH of dy·B     narrow by depth:   B [N, R], no mask
//
// With dropout a stream (a projection) has its own mask, drawn here and stored, a bit an element (dropout.py has the
// contract); what is kept is not rescaled, that is reduce_partials's.
#pragma once

#include <cstdint>

namespace peft_kernels::lora_shrink {

// Sizes in elements. Operands are of 16 bits, their rows of unit stride, start and pitch multiples of 8 elements.
struct Arguments {
  const void* wide;    // [rows, depth]
  int64_t wide_pitch;  // from one row to the next
  const void* narrow;  // [streams * width, depth], or [depth, width]
  int64_t narrow_pitch;
  float* partials;      // [splits, rows, streams * width], contiguous
  const int64_t* seed;  // of dropout, or null
  uint8_t* mask;        // [streams, rows, ceil(depth / 8)], or null: to be drawn, not to be stored
  int32_t threshold;    // the draw from which on an element is kept
  int rows, depth, width, streams, splits;
  int part;  // of the depth, a multiple of kDepth
};

}  // namespace peft_kernels::lora_shrink
