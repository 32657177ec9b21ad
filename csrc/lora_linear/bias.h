// The bias of the columns that a thread holds sums of.
#pragma once

#include "common/kernel_source.h"

namespace peft_kernels {

// Of a fragment's pair of columns, in float32; zeros beyond the last, and without a bias.
template <typename T>
PEFT_KERNELS_DEVICE void load_bias(const void* bias, int columns, int column, float (&pair)[2]) {
  PEFT_KERNELS_UNROLL
  for (int k = 0; k < 2; ++k) {
    const bool there = bias != nullptr && column + k < columns;
    pair[k] = there ? static_cast<float>(static_cast<const T*>(bias)[column + k]) : 0.0f;
  }
}

}  // namespace peft_kernels
