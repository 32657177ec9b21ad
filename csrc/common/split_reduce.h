// The second half of every split reduction, as a host function; also an op by itself (split_reduce.cu).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace peft_kernels {

// out[m, r] = scale · row_scale[m] · Σ_p partials[p, m, r] in `out_dtype`: [M, R] of float32 [P, M, R], each [M, R] contiguous.
torch::stable::Tensor split_reduce(const torch::stable::Tensor& partials,
                                   const std::optional<torch::stable::Tensor>& row_scale, double scale,
                                   torch::headeronly::ScalarType out_dtype);

}  // namespace peft_kernels
