// The GEMM with a low-rank product (gemm.h) as an op: what it takes, then the tile, then the launch.
//
//   lora_gemm(left [M, K], right, low_left [M, R], low_right, dropout_mask, bias? [N], by_feature) -> out [M, N]
//   each operand a list of one to three, K and R of their own; by_feature: right is [N, K] and low_right [N, R], otherwise
//   [K, N] and [R, N]; dropout_mask a list of no mask, of one for all, or of one for each
//
// bfloat16 or float16 on sm_80 and later; rows of unit stride that start on 16 bytes. Where out has few tiles K is
// split, and the workspace is float32 [P, M, N], P up to 32; otherwise none. The tiles for sm_90a also take an N of a multiple
// of 8, as the copy engine stores `out` too, and K of at least 1.

#include "common/checks.h"
#include "common/kernel_table.h"
#include "common/launch.h"
#include "common/operands.h"
#include "common/reduce_partials.h"
#include "ops/lora_linear/calls.h"
#include "ops/lora_linear/gemm_sm80_launch.h"

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
Status launch_tile(const Arguments& args, TileName tile, int processors, cudaStream_t stream) {
  if (of_boxes(tile)) return launch_sm90<T, kByFeature>(args, tile, processors, stream);
  return launch_sm80<T, kByFeature>(args, tile, stream);
}

// [height, K] and [features, K] or, by K, [K, features], on the device and in the dtype of `like`.
Pair pair_of(const Tensor& left, const Tensor& right, const char* left_name, const char* right_name, int64_t rows,
             int64_t columns, bool by_feature, const Tensor& like) {
  STD_TORCH_CHECK(left.dim() == 2, kOp, ": expected ", left_name, " of two dimensions, got ", shape_of(left));
  const int64_t K = left.size(1);
  check_sizes(kOp, {K});
  check_operand(kOp, left, left_name, rows, K, like);
  check_operand(kOp, right, right_name, by_feature ? columns : K, by_feature ? K : columns, like);
  return {left.const_data_ptr(), pitch_of(left), right.const_data_ptr(), pitch_of(right), static_cast<int>(K)};
}

}  // namespace

Call::Call(const std::vector<Tensor>& left, const std::vector<Tensor>& right, const std::vector<Tensor>& low_left,
           const std::vector<Tensor>& low_right, const std::vector<Tensor>& dropout_mask, const std::optional<Tensor>& bias,
           bool by_feature)
    : by_feature_(by_feature) {
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
  args_.pairs = static_cast<int>(pairs);
  for (size_t j = 0; j < pairs; ++j) {
    args_.base[j] = pair_of(left[j], right[j], "left", "right", rows, columns, by_feature, like);
    args_.low[j] = pair_of(low_left[j], low_right[j], "low_left", "low_right", rows, columns, by_feature, like);
  }
  STD_TORCH_CHECK(dropout_mask.size() <= 1 || dropout_mask.size() == pairs, kOp, ": expected no mask, one, or ", pairs,
                  ", got ",
                  dropout_mask.size());
  for (const Tensor& mask : dropout_mask) {
    STD_TORCH_CHECK(mask.dim() == 2 && mask.size(0) == rows && mask.size(1) == (columns + 7) / 8 &&
                        mask.scalar_type() == ScalarType::Byte && mask.is_contiguous(),
                    kOp, ": expected a contiguous dropout_mask, uint8 [", rows, ", ", (columns + 7) / 8, "], got ",
                    shape_of(mask));
    check_same_device(mask, "dropout_mask", like);
    args_.dropout_mask[args_.masks++] = static_cast<const uint8_t*>(mask.const_data_ptr());
  }
  check_bias(kOp, bias, columns, like);
  args_.bias = bias ? bias->const_data_ptr() : nullptr;
  args_.rows = static_cast<int>(rows), args_.columns = static_cast<int>(columns), args_.parts = 1;
  dtype_ = like.scalar_type(), device_ = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device_);
  if (rows == 0 || columns == 0) {
    out_ = torch::stable::new_empty(like, {rows, columns});
    return;
  }

  processors_ = processors_of(device_);
  const bool boxes = columns % 8 == 0 && args_.base[0].K > 0 && has_boxes(device_);
  tile_ = choose(rows, columns, processors_, boxes);
  const int64_t small_tiles = static_cast<int64_t>(tiles_of(rows, Small::kRows)) * tiles_of(columns, Small::kColumns);
  const int stages = stages_of(args_.base, args_.pairs, Small::kBlockK);
  if (tile_ == TileName::kSmall) args_.parts = splits_of(stages, 1, small_tiles, processors_);
  if (tile_ == TileName::kBoxSquare) {  // one block an SM
    args_.parts = splits_of(stages, 1, clusters_of<BoxSquare>(rows, columns) * BoxSquare::kCluster, processors_ / 2);
  }
  args_.part = slice_of(stages, args_.parts, 1);
  blocks_for(small_tiles * args_.parts, 1);  // they fit
  if (args_.parts > 1) {
    out_ = torch::stable::new_empty(like, {args_.parts, rows, columns}, ScalarType::Float);
    args_.partials = static_cast<float*>(out_.mutable_data_ptr());
  } else {
    out_ = torch::stable::new_empty(like, {rows, columns});
    args_.out = out_.mutable_data_ptr();
  }
}

void Call::launch() const {
  if (args_.rows == 0 || args_.columns == 0) return;
  const auto call = dtype_ == ScalarType::Half
                        ? (by_feature_ ? &launch_tile<__half, true> : &launch_tile<__half, false>)
                        : (by_feature_ ? &launch_tile<__nv_bfloat16, true> : &launch_tile<__nv_bfloat16, false>);
  const torch::stable::accelerator::DeviceGuard guard(device_);
  check_cuda(call(args_, tile_, processors_, current_stream(device_)), "launching lora_gemm");
}

Tensor Call::result() const { return args_.parts > 1 ? reduce_partials(out_, 1.0, dtype_) : out_; }

namespace {

Tensor lora_gemm(std::vector<Tensor> left, std::vector<Tensor> right, std::vector<Tensor> low_left,
                 std::vector<Tensor> low_right, std::vector<Tensor> dropout_mask, const std::optional<Tensor>& bias,
                 bool by_feature) {
  const Call call(left, right, low_left, low_right, dropout_mask, bias, by_feature);
  call.launch();
  return call.result();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_native, CUDA, m) { m.impl("lora_gemm", TORCH_BOX(&lora_gemm)); }

}  // namespace peft_kernels::lora_gemm
