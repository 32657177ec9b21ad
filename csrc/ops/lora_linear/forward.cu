// The forward as one kernel (forward.h) as an op: what it takes, then the launch.
//
//   lora_forward(x [M, K], weight [N, K], lora_A [R, K], lora_B [N, R], row_scale? float32 [M], scale, bias? [N])
//     -> y [M, N], S [M, R filled up to a multiple of 8]
//
// bfloat16 or float16 on compute capability 9.0; rows of unit stride that start on 16 bytes, N a positive multiple of 8, K of
// at least 1, R from 1 to 64. No workspace.

#include "common/checks.h"
#include "common/kernel_table.h"
#include "common/launch.h"
#include "common/operands.h"
#include "ops/lora_linear/forward_sm90_launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace peft_kernels::lora_forward {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define ENTRY(T, ranks)                                                                                            \
  KernelEntry("forward_sm90<" #T ", " #ranks ">", reinterpret_cast<const void*>(&forward_sm90<T, ranks>), \
              BoxForward<T, ranks>::kSharedBytes)
#define ENTRIES(T) ENTRY(T, 16), ENTRY(T, 32), ENTRY(T, 64)
const KernelEntry kEntries[] = {ENTRIES(__nv_bfloat16), ENTRIES(__half)};
#undef ENTRIES
#undef ENTRY

constexpr const char* kOp = "lora_forward";

Operand operand_of(const Tensor& tensor) { return {tensor.const_data_ptr(), pitch_of(tensor)}; }

std::tuple<Tensor, Tensor> lora_forward(const Tensor& x, const Tensor& weight, const Tensor& lora_A,
                                        const Tensor& lora_B, const std::optional<Tensor>& row_scale, double scale,
                                        const std::optional<Tensor>& bias) {
  check_16_bit(kOp, x, "x");
  STD_TORCH_CHECK(weight.dim() == 2 && lora_A.dim() == 2, kOp, ": expected weight and lora_A of two dimensions, got ",
                  shape_of(weight), " and ", shape_of(lora_A));
  const int64_t rows = x.size(0), K = x.size(1), columns = weight.size(0), rank = lora_A.size(0);
  check_sizes(kOp, {rows, K, columns});
  STD_TORCH_CHECK(K >= 1 && columns >= 1 && columns % 8 == 0 && 1 <= rank && rank <= kMostRanks, kOp,
                  ": expected K of at least 1, N a positive multiple of 8 and R from 1 to ", kMostRanks, ", got K ", K,
                  ", N ", columns, ", R ", rank);
  check_operand(kOp, x, "x", rows, K, x);
  check_operand(kOp, weight, "weight", columns, K, x);
  check_operand(kOp, lora_A, "lora_A", rank, K, x);
  check_operand(kOp, lora_B, "lora_B", columns, rank, x);
  if (row_scale) {
    STD_TORCH_CHECK(row_scale->dim() == 1 && row_scale->size(0) == rows && row_scale->is_contiguous() &&
                        row_scale->scalar_type() == ScalarType::Float,
                    kOp, ": expected a contiguous row_scale, float32 [", rows, "], got ", shape_of(*row_scale));
    check_same_device(*row_scale, "row_scale", x);
  }
  check_bias(kOp, bias, columns, x);

  const int32_t device = x.get_device_index();
  STD_TORCH_CHECK(has_boxes(device), kOp,
                  ": expected a GPU of compute capability 9.0 and a library built for sm_90a, got another");
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor y = torch::stable::new_empty(x, {rows, columns}), s = torch::stable::new_empty(x, {rows, (rank + 7) / 8 * 8});
  if (rows == 0) return {y, s};

  const Arguments args{
      operand_of(x), operand_of(weight), operand_of(lora_A), operand_of(lora_B),
      bias ? bias->const_data_ptr() : nullptr,
      row_scale ? static_cast<const float*>(row_scale->const_data_ptr()) : nullptr, static_cast<float>(scale),
      y.mutable_data_ptr(), s.mutable_data_ptr(), static_cast<int>(rows), static_cast<int>(columns),
      static_cast<int>(K), static_cast<int>(rank),
  };
  const auto launch = x.scalar_type() == ScalarType::Half ? &launch_sm90<__half> : &launch_sm90<__nv_bfloat16>;
  check_cuda(launch(args, processors_of(device), current_stream(device)), "launching lora_forward");
  return {y, s};
}

bool runs_on(int64_t device) { return has_boxes(static_cast<int32_t>(device)); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_native, CUDA, m) { m.impl("lora_forward", TORCH_BOX(&lora_forward)); }

// Asked without a tensor: whether `lora_forward` runs on that CUDA device, by this library.
STABLE_TORCH_LIBRARY_IMPL(peft_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("has_boxes", TORCH_BOX(&runs_on));
}

}  // namespace peft_kernels::lora_forward
