// dx and dA as an op: the pass over x runs beside the last tiles of the GEMM, on SMs that have no tile left.
//
//   lora_grads(left, right, low_left, low_right, dropout_mask, by_feature, activation, rank_factor, activation_mask?,
//              streams) -> (out, sums)
//   out [M, N]: lora_gemm of the first six, without a bias (gemm.cu); sums: of lora_outer of the others, transposed
//   (outer.cu), activation [M, N]
//
// Takes, allocates and refuses what the two do, and gives their bits. Beside each other they run where the kernels for sm_90a do,
// elsewhere one after the other.

#include "common/checks.h"
#include "common/launch.h"
#include "ops/lora_linear/calls.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

namespace peft_kernels {
namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> lora_grads(std::vector<Tensor> left, std::vector<Tensor> right, std::vector<Tensor> low_left,
                                      std::vector<Tensor> low_right, std::vector<Tensor> dropout_mask, bool by_feature,
                                      const Tensor& activation, const Tensor& rank_factor,
                                      const std::optional<Tensor>& activation_mask, int64_t streams) {
  const lora_gemm::Call gemm(left, right, low_left, low_right, dropout_mask, std::nullopt, by_feature);
  check_same_device(activation, "activation", left[0]);
  const lora_outer::Call outer(activation, rank_factor, std::nullopt, activation_mask, streams, true);
  // Also so that there is a GEMM wherever there is a pass, and no other kernel before it.
  STD_TORCH_CHECK(activation.size(0) == left[0].size(0) && activation.size(1) == right[0].size(by_feature ? 0 : 1),
                  "lora_grads: expected activation [", left[0].size(0), ", ", right[0].size(by_feature ? 0 : 1),
                  "], as out, got ",
                  shape_of(activation));
  gemm.launch();
  outer.launch(has_boxes(activation.get_device_index()));
  return {gemm.result(), outer.sums()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_native, CUDA, m) { m.impl("lora_grads", TORCH_BOX(&lora_grads)); }

}  // namespace peft_kernels
