// One pass over wide rows for the gradient of a low-rank matrix, in parts of the rows that reduce_partials adds up; with dy also
// for dH:
//
//   sums[p]    = D(wide)ᵀ·narrow    over the p-th part of the rows: dB of dyᵀ·S [N, R], dA of (D(x)ᵀ·dH)ᵀ [R, K]; where
//                                   ranks are many, or projections have masks of their own, in streams one behind another
//   shrunk[s]  = wide·right         over the s-th slice of the columns: dH of dy·B [M, R]
#pragma once

#include <cstdint>

namespace peft_kernels::lora_outer {

// Sizes in elements. Operands are of 16 bits, their rows of unit stride, start and pitch multiples of 8 elements.
struct Arguments {
  const void* wide;    // [rows, columns]
  int64_t wide_pitch;  // from one row to the next
  const void* narrow;  // [rows, streams·width], of several streams a multiple of 8 each
  int64_t narrow_pitch;
  const void* right;  // [columns, width], or null: no shrunk
  int64_t right_pitch;
  const uint8_t* keep;  // of wide [masks, rows, ceil(columns / 8)], a bit an element, each for streams / masks; or null
  float* sums;          // [parts, streams, columns, width], or [parts, streams, width, columns] where transposed
  float* shrunk;        // [slices of kSlice columns, rows, width]
  int rows, columns, width, streams, masks, parts;
  int part;  // of the rows, a multiple of kRows
  bool transposed;
};

}  // namespace peft_kernels::lora_outer
