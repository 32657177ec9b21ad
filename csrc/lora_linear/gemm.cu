// The GEMM with a low-rank product (gemm.h) as an op: what it takes, then the tile, then the launch.
//
//   lora_gemm(left [M, K], right, low_left [M, R], low_right, keep, bias? [N], by_feature) -> out [M, N]
//   each operand a list of one to three, K and R of their own; by_feature: right is [N, K] and low_right [N, R], otherwise
//   [K, N] and [R, N]; keep a list of no mask, of one for all, or of one for each
//
// bfloat16 or float16 on sm_80 and later; rows of unit stride that start on 16 bytes. Where out has few tiles the depth is
// split, and the workspace is float32 [P, M, N], P up to 32; otherwise none. The tiles for sm_90a also take an N of a multiple
// of 8, as the copy engine stores `out` too, and K of at least 1.

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
#include <vector>

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
  return of_boxes(tile) ? launch_sm90<T, kByFeature>(args, tile, processors, stream)
                        : launch_sm80<T, kByFeature>(args, tile, stream);
}

// [height, depth] and [features, depth] or, by depth, [depth, features], on the device and in the dtype of `like`.
Pair pair_of(const Tensor& left, const Tensor& right, const char* left_name, const char* right_name, int64_t rows,
             int64_t columns, bool by_feature, const Tensor& like) {
  STD_TORCH_CHECK(left.dim() == 2, kOp, ": expected ", left_name, " of two dimensions, got ", shape_of(left));
  const int64_t depth = left.size(1);
  check_sizes(kOp, {depth});
  check_operand(kOp, left, left_name, rows, depth, like);
  check_operand(kOp, right, right_name, by_feature ? columns : depth, by_feature ? depth : columns, like);
  return {left.const_data_ptr(), pitch_of(left), right.const_data_ptr(), pitch_of(right), static_cast<int>(depth)};
}

Tensor lora_gemm(std::vector<Tensor> left, std::vector<Tensor> right, std::vector<Tensor> low_left,
                 std::vector<Tensor> low_right, std::vector<Tensor> keep, const std::optional<Tensor>& bias,
                 bool by_feature) {
  const size_t pairs = left.size();
  STD_TORCH_CHECK(1 <= pairs && pairs <= kMostPairs && right.size() == pairs && low_left.size() == pairs &&
                      low_right.size() == pairs,
                  kOp, ": expected 1 to ", kMostPairs, " operands of each kind, got ", pairs, ", ", right.size(), ", ",
                  low_left.size(), " and ", low_right.size());
  const Tensor& like = left[0];
  check_16_bit(kOp, like, "left");
  STD_TORCH_CHECK(right[0].dim() == 2, kOp, ": expected right of two dimensions, got ", shape_of(right[0]));
  const int64_t rows = like.size(0), columns = right[0].size(by_feature ? 0 : 1);
  check_sizes(kOp, {rows, columns});
  Arguments args{};
  args.pairs = static_cast<int>(pairs);
  for (size_t j = 0; j < pairs; ++j) {
    args.base[j] = pair_of(left[j], right[j], "left", "right", rows, columns, by_feature, like);
    args.low[j] = pair_of(low_left[j], low_right[j], "low_left", "low_right", rows, columns, by_feature, like);
  }
  STD_TORCH_CHECK(keep.size() <= 1 || keep.size() == pairs, kOp, ": expected no mask, one, or ", pairs, ", got ",
                  keep.size());
  for (const Tensor& mask : keep) {
    STD_TORCH_CHECK(mask.dim() == 2 && mask.size(0) == rows && mask.size(1) == (columns + 7) / 8 &&
                        mask.scalar_type() == ScalarType::Byte && mask.is_contiguous(),
                    kOp, ": expected a contiguous keep, uint8 [", rows, ", ", (columns + 7) / 8, "], got ",
                    shape_of(mask));
    check_same_device(mask, "keep", like);
    args.keep[args.masks++] = static_cast<const uint8_t*>(mask.const_data_ptr());
  }
  check_bias(kOp, bias, columns, like);
  args.bias = bias ? bias->const_data_ptr() : nullptr;

  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (rows == 0 || columns == 0) return torch::stable::new_empty(like, {rows, columns});

  const int processors = processors_of(device);
  const bool boxes = columns % 8 == 0 && args.base[0].depth > 0 && has_boxes(device);
  const TileName tile = choose(rows, columns, processors, boxes);
  const int64_t small_tiles = static_cast<int64_t>(tiles_of(rows, Small::kRows)) * tiles_of(columns, Small::kColumns);
  const int stages = stages_of(args.base, args.pairs, Small::kDepth);
  args.parts = 1;
  if (tile == TileName::kSmall) args.parts = parts_of(stages, 1, small_tiles, processors);
  if (tile == TileName::kBoxSquare) {  // one block an SM
    const int64_t tiles = static_cast<int64_t>(tiles_of(rows, BoxSquare::kRows)) * tiles_of(columns, BoxSquare::kColumns);
    args.parts = parts_of(stages, 1, tiles, processors / 2);
  }
  args.part = part_of(stages, args.parts, 1);
  blocks_for(small_tiles * args.parts, 1);  // they fit
  args.rows = static_cast<int>(rows), args.columns = static_cast<int>(columns);
  const bool split = args.parts > 1;
  Tensor out = split ? torch::stable::new_empty(like, {args.parts, rows, columns}, ScalarType::Float)
                     : torch::stable::new_empty(like, {rows, columns});
  if (split) {
    args.partials = static_cast<float*>(out.mutable_data_ptr());
  } else {
    args.out = out.mutable_data_ptr();
  }
  const auto call = like.scalar_type() == ScalarType::Half
                        ? (by_feature ? &launch<__half, true> : &launch<__half, false>)
                        : (by_feature ? &launch<__nv_bfloat16, true> : &launch<__nv_bfloat16, false>);
  check_cuda(call(args, tile, processors, current_stream(device)), "launching lora_gemm");
  return split ? split_reduce(out, 1.0, like.scalar_type()) : out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_native, CUDA, m) { m.impl("lora_gemm", TORCH_BOX(&lora_gemm)); }

}  // namespace peft_kernels::lora_gemm
