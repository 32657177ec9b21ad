// The GEMM with a low-rank product (gemm.h) as an op: what it takes, then the tile, then the launch.
//
//   lora_gemm(left [M, K], right, low_left [M, R], low_right, keep?, bias? [N], by_feature) -> out [M, N]
//   by_feature: right is [N, K] and low_right [N, R]; otherwise [K, N] and [R, N]
//
// bfloat16 or float16 on sm_80 and later; rows of unit stride that start on 16 bytes. Where out has few tiles the depth is split,
// and the workspace is float32 [P, M, N], P up to 32; otherwise none. The tiles for sm_90a also
// take an N of a multiple of 8, as the copy engine stores `out` too, and K of at least 1.

#include "common/checks.h"
#include "common/kernel_table.h"
#include "common/launch.h"
#include "common/operands.h"
#include "common/split_reduce.h"
#include "lora_linear/gemm_sm80.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
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

constexpr const char* kOp = "lora_gemm";

template <typename T, bool kByFeature>
cudaError_t launch(const Arguments& args, TileName tile, int processors, cudaStream_t stream) {
  const bool boxes = tile == TileName::kBoxWide || tile == TileName::kBoxSquare;
  return boxes ? launch_sm90<T, kByFeature>(args, tile, processors, stream) : launch_sm80<T, kByFeature>(args, tile, stream);
}

Tensor lora_gemm(const Tensor& left, const Tensor& right, const Tensor& low_left, const Tensor& low_right,
                 const std::optional<Tensor>& keep, const std::optional<Tensor>& bias, bool by_feature) {
  check_16_bit(kOp, left, "left");
  STD_TORCH_CHECK(right.dim() == 2 && low_left.dim() == 2, kOp, ": expected right and low_left of two dimensions, got ",
                  shape_of(right), " and ", shape_of(low_left));
  const int64_t rows = left.size(0), depth = left.size(1), rank = low_left.size(1);
  const int64_t columns = right.size(by_feature ? 0 : 1);
  check_sizes(kOp, {rows, columns, depth, rank});
  check_operand(kOp, left, "left", rows, depth, left);
  check_operand(kOp, right, "right", by_feature ? columns : depth, by_feature ? depth : columns, left);
  check_operand(kOp, low_left, "low_left", rows, rank, left);
  check_operand(kOp, low_right, "low_right", by_feature ? columns : rank, by_feature ? rank : columns, left);
  if (keep) {
    STD_TORCH_CHECK(keep->dim() == 2 && keep->size(0) == rows && keep->size(1) == (columns + 7) / 8 &&
                        keep->scalar_type() == ScalarType::Byte && keep->is_contiguous(),
                    kOp, ": expected a contiguous keep, uint8 [", rows, ", ", (columns + 7) / 8, "], got ",
                    shape_of(*keep));
    check_same_device(*keep, "keep", left);
  }
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == columns && bias->is_contiguous() &&
                        bias->scalar_type() == left.scalar_type(),
                    kOp, ": expected a contiguous bias [", columns, "] in left's dtype, got ", shape_of(*bias));
    check_same_device(*bias, "bias", left);
  }

  const int32_t device = left.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (rows == 0 || columns == 0) return torch::stable::new_empty(left, {rows, columns});

  const int processors = processors_of(device);
  const bool boxes = columns % 8 == 0 && depth > 0 && has_boxes(device);
  const TileName tile = choose(rows, columns, processors, boxes);
  const int64_t small_tiles = static_cast<int64_t>(tiles_of(rows, Small::kRows)) * tiles_of(columns, Small::kColumns);
  const int parts = tile == TileName::kSmall ? parts_of(depth, Small::kDepth, small_tiles, processors) : 1;
  blocks_for(small_tiles * parts, 1);  // they fit
  Tensor out = parts > 1 ? torch::stable::new_empty(left, {parts, rows, columns}, ScalarType::Float)
                         : torch::stable::new_empty(left, {rows, columns});
  const Arguments args{
      left.const_data_ptr(), pitch_of(left), right.const_data_ptr(), pitch_of(right),
      low_left.const_data_ptr(), pitch_of(low_left), low_right.const_data_ptr(), pitch_of(low_right),
      keep ? static_cast<const uint8_t*>(keep->const_data_ptr()) : nullptr, bias ? bias->const_data_ptr() : nullptr,
      parts > 1 ? nullptr : out.mutable_data_ptr(), static_cast<int>(rows), static_cast<int>(columns),
      static_cast<int>(depth), static_cast<int>(rank),
      parts > 1 ? static_cast<float*>(out.mutable_data_ptr()) : nullptr, parts, part_of(depth, parts, Small::kDepth),
  };
  const auto call = left.scalar_type() == ScalarType::Half
                        ? (by_feature ? &launch<__half, true> : &launch<__half, false>)
                        : (by_feature ? &launch<__nv_bfloat16, true> : &launch<__nv_bfloat16, false>);
  check_cuda(call(args, tile, processors, current_stream(device)), "launching lora_gemm");
  return parts > 1 ? split_reduce(out, std::nullopt, 1.0, left.scalar_type()) : out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_native, CUDA, m) { m.impl("lora_gemm", TORCH_BOX(&lora_gemm)); }

}  // namespace peft_kernels::lora_gemm
