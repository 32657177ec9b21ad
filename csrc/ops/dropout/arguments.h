// What both implementations of draw_mask are given.
#pragma once

#include "ops/dropout/philox.h"

#include <cstdint>

namespace peft_kernels::dropout {

struct Arguments {
  const int64_t* seed;  // on the mask's device
  uint8_t* mask;        // [streams, rows, groups], contiguous
  int64_t rows;
  int64_t groups;     // bytes of a row
  int64_t numel;      // streams * rows * groups
  int32_t threshold;  // the draw from which on an element is kept
};

}  // namespace peft_kernels::dropout
