// The GEMM and the outer products in two steps: what they take is checked and their results allocated, then they are launched.
// So an op of both (grads.cpp) launches nothing before all is checked, and takes no memory between two kernels that run beside
// each other: torch's allocator hands out again what was freed before, though an earlier kernel may still read it.
#pragma once

#include "ops/lora_linear/gemm.h"
#include "ops/lora_linear/outer.h"

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace peft_kernels::lora_gemm {

class Call {
 public:
  // As the op `lora_gemm` (gemm.cu).
  Call(const std::vector<torch::stable::Tensor>& left, const std::vector<torch::stable::Tensor>& right,
       const std::vector<torch::stable::Tensor>& low_left, const std::vector<torch::stable::Tensor>& low_right,
       const std::vector<torch::stable::Tensor>& dropout_mask, const std::optional<torch::stable::Tensor>& bias,
       bool by_feature);
  void launch() const;
  torch::stable::Tensor result() const;  // once it is launched

 private:
  Arguments args_{};
  TileName tile_{};
  int processors_ = 0;
  int32_t device_;
  torch::headeronly::ScalarType dtype_;
  bool by_feature_;
  torch::stable::Tensor out_;  // or its partials
};

}  // namespace peft_kernels::lora_gemm

namespace peft_kernels::lora_outer {

class Call {
 public:
  // As the op `lora_outer` (outer.cu).
  Call(const torch::stable::Tensor& activation, const torch::stable::Tensor& rank_factor,
       const std::optional<torch::stable::Tensor>& right, const std::optional<torch::stable::Tensor>& dropout_mask,
       int64_t streams, bool transposed);
  // `beside`: it may start before the kernel launched last has ended. That one has to be a launch as always, after all that
  // this one reads was there, and made after this object: what it reads is then none of the results' memory.
  void launch(bool beside = false) const;
  const torch::stable::Tensor& sums() const { return sums_; }
  const torch::stable::Tensor& shrunk() const { return shrunk_; }

 private:
  Arguments args_{};
  int32_t device_;
  torch::headeronly::ScalarType dtype_;
  torch::stable::Tensor sums_, shrunk_;
};

}  // namespace peft_kernels::lora_outer
