// One pass over the rows of x or dy for the gradient of a low-rank matrix, in slices of the rows that reduce_partials adds up;
// with dy also for dH:
//
//   sums[p]    = D(activation)ᵀ·rank_factor    over the p-th slice of the rows: dB of dyᵀ·S [N, R], dA of (D(x)ᵀ·dH)ᵀ [R, K]; where
//                                   ranks are many, or projections have masks of their own, in streams one behind another
//   shrunk[s]  = activation·lora_B         over the s-th slice of the columns: dH of dy·B [M, R]
#pragma once

#include <cstdint>

namespace peft_kernels::lora_outer {

// Sizes in elements. Operands are of 16 bits, their rows of unit stride, start and pitch multiples of 8 elements.
struct Arguments {
  const void* activation;    // [rows, columns]
  int64_t activation_pitch;  // from one row to the next
  const void* rank_factor;  // [rows, streams·width], of several streams a multiple of 8 each
  int64_t rank_factor_pitch;
  const void* lora_B;  // [columns, width], or null: no shrunk
  int64_t lora_B_pitch;
  // Of the activation [masks, rows, ceil(columns / 8)], a bit an element, each for streams / masks; or null.
  const uint8_t* dropout_mask;
  float* sums;          // [parts, streams, columns, width], or [parts, streams, width, columns] where transposed
  float* shrunk;        // [slices of kSlice columns, rows, width]
  int rows, columns, width, streams, masks, parts;
  int part;  // of the rows, a multiple of kRows
  bool transposed;
};

}  // namespace peft_kernels::lora_outer
