// What both implementations of draw_mask check, and how they come to their arguments.
#pragma once

#include "common/checks.h"
#include "ops/dropout/arguments.h"

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace peft_kernels::dropout {

// An empty mask, uint8 [streams, rows, ceil(columns / 8)], beside the seed.
inline torch::stable::Tensor empty_mask(const torch::stable::Tensor& seed, int64_t rows, int64_t columns,
                                        int64_t threshold, int64_t streams) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "expected seed int64 [1], got ",
                  shape_of(seed), " or another dtype");
  STD_TORCH_CHECK(rows >= 0 && columns >= 0 && streams >= 0, "expected sizes of at least 0, got rows ", rows,
                  ", columns ", columns, ", streams ", streams);
  STD_TORCH_CHECK(-32768 <= threshold && threshold <= 32768, "expected a threshold from -32768 to 32768, got ",
                  threshold);
  return torch::stable::new_empty(seed, {streams, rows, (columns + kColumns - 1) / kColumns}, ScalarType::Byte);
}

inline Arguments arguments(const torch::stable::Tensor& seed, const torch::stable::Tensor& mask, int64_t threshold) {
  return {static_cast<const int64_t*>(seed.const_data_ptr()),
          static_cast<uint8_t*>(mask.mutable_data_ptr()),
          mask.size(1),
          mask.size(2),
          mask.numel(),
          static_cast<int32_t>(threshold)};
}

}  // namespace peft_kernels::dropout
