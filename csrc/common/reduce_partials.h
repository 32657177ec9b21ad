// The second half of every split reduction, as a host function; as an op of several by one launch (reduce_partials.cu).
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace peft_kernels {

// out[m, r] = scale · Σ_p partials[p, m, r] in `out_dtype`: [M, R] of float32 [P, M, R], each [M, R] contiguous.
torch::stable::Tensor reduce_partials(const torch::stable::Tensor& partials, double scale,
                                   torch::headeronly::ScalarType out_dtype);

}  // namespace peft_kernels
