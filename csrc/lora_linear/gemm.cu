// The GEMM with a low-rank product (gemm.h) as an op: what it takes, then the tile, then the launch.
//
//   lora_gemm(left [M, K], right, low_left [M, R], low_right, keep?, bias? [N], by_feature) -> out [M, N]
//   by_feature: right is [N, K] and low_right [N, R]; otherwise [K, N] and [R, N]
//
// bfloat16 or float16 on sm_80 and later; rows of unit stride that start on 16 bytes. No workspace.

#include "common/checks.h"
#include "common/kernel_table.h"
#include "common/launch.h"
#include "lora_linear/gemm_sm80.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <limits>
#include <optional>

namespace peft_kernels::lora_gemm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define ENTRY(T, tile, by_feature)                                                                     \
  KernelEntry("gemm_sm80<" #T ", " #tile ", " #by_feature ">",                                         \
              reinterpret_cast<const void*>(&gemm_sm80<T, tile, by_feature>),                          \
              Gemm<T, tile, by_feature>::kSharedBytes)
#define ENTRIES(T)                                                                                     \
  ENTRY(T, Wide, true), ENTRY(T, Wide, false), ENTRY(T, Square, true), ENTRY(T, Square, false),        \
      ENTRY(T, Small, true), ENTRY(T, Small, false)
const KernelEntry kEntries[] = {ENTRIES(__nv_bfloat16), ENTRIES(__half)};
#undef ENTRIES
#undef ENTRY

// [height, width] in left's dtype, of which every row starts on 16 bytes.
void check_operand(const Tensor& tensor, const char* name, int64_t height, int64_t width, const Tensor& left) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == height && tensor.size(1) == width, "lora_gemm: expected ", name,
                  " [", height, ", ", width, "], got ", shape_of(tensor));
  STD_TORCH_CHECK(tensor.scalar_type() == left.scalar_type(), "lora_gemm: expected ", name, " in left's dtype");
  check_same_device(tensor, name, left);
  const bool aligned = reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  STD_TORCH_CHECK(tensor.numel() == 0 || (aligned && (width == 1 || tensor.stride(1) == 1) &&
                                          (height == 1 || (tensor.stride(0) % kChunk == 0 && tensor.stride(0) >= width))),
                  "lora_gemm: expected rows of ", name, " that start on 16 bytes, got strides (", tensor.stride(0), ", ",
                  tensor.stride(1), ")", aligned ? "" : " from an address that does not");
}

Tensor lora_gemm(const Tensor& left, const Tensor& right, const Tensor& low_left, const Tensor& low_right,
                 const std::optional<Tensor>& keep, const std::optional<Tensor>& bias, bool by_feature) {
  STD_TORCH_CHECK(left.dim() == 2, "lora_gemm: expected left [M, K], got ", shape_of(left));
  STD_TORCH_CHECK(left.scalar_type() == ScalarType::BFloat16 || left.scalar_type() == ScalarType::Half,
                  "lora_gemm: expected bfloat16 or float16, got another dtype");
  STD_TORCH_CHECK(right.dim() == 2 && low_left.dim() == 2, "lora_gemm: expected right and low_left of two dimensions, got ",
                  shape_of(right), " and ", shape_of(low_left));
  const int64_t rows = left.size(0), depth = left.size(1), rank = low_left.size(1);
  const int64_t columns = right.size(by_feature ? 0 : 1);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 1024;  // so that sizes rounded up to tiles fit
  STD_TORCH_CHECK(rows <= kMost && columns <= kMost && depth <= kMost && rank <= kMost,
                  "lora_gemm: expected sizes below 2^31, got ", shape_of(left), " and ", shape_of(right));
  check_operand(left, "left", rows, depth, left);
  check_operand(right, "right", by_feature ? columns : depth, by_feature ? depth : columns, left);
  check_operand(low_left, "low_left", rows, rank, left);
  check_operand(low_right, "low_right", by_feature ? columns : rank, by_feature ? rank : columns, left);
  if (keep) {
    STD_TORCH_CHECK(keep->dim() == 2 && keep->size(0) == rows && keep->size(1) == (columns + 7) / 8 &&
                        keep->scalar_type() == ScalarType::Byte && keep->is_contiguous(),
                    "lora_gemm: expected a contiguous keep, uint8 [", rows, ", ", (columns + 7) / 8, "], got ",
                    shape_of(*keep));
    check_same_device(*keep, "keep", left);
  }
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == columns && bias->is_contiguous() &&
                        bias->scalar_type() == left.scalar_type(),
                    "lora_gemm: expected a contiguous bias [", columns, "] in left's dtype, got ", shape_of(*bias));
    check_same_device(*bias, "bias", left);
  }

  const int32_t device = left.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor out = torch::stable::new_empty(left, {rows, columns});
  if (out.numel() == 0) return out;

  const auto pitch = [](const Tensor& tensor) { return tensor.size(0) > 1 ? tensor.stride(0) : int64_t{0}; };
  const Arguments args{
      left.const_data_ptr(), pitch(left), right.const_data_ptr(), pitch(right),
      low_left.const_data_ptr(), pitch(low_left), low_right.const_data_ptr(), pitch(low_right),
      keep ? static_cast<const uint8_t*>(keep->const_data_ptr()) : nullptr, bias ? bias->const_data_ptr() : nullptr,
      out.mutable_data_ptr(), static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(depth),
      static_cast<int>(rank),
  };
  int processors = 0;
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "counting processors");
  const TileName tile = choose(rows, columns, processors);
  blocks_for(static_cast<int64_t>(tiles_of(rows, Small::kRows)) * tiles_of(columns, Small::kColumns), 1);  // it fits
  const auto launch = left.scalar_type() == ScalarType::Half
                          ? (by_feature ? &launch_sm80<__half, true> : &launch_sm80<__half, false>)
                          : (by_feature ? &launch_sm80<__nv_bfloat16, true> : &launch_sm80<__nv_bfloat16, false>);
  check_cuda(launch(args, tile, current_stream(device)), "launching lora_gemm");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_native, CUDA, m) { m.impl("lora_gemm", TORCH_BOX(&lora_gemm)); }

}  // namespace peft_kernels::lora_gemm
