// The shrink (shrink.h) as an op: what it takes, then in how many parts, then the launch.
//
//   lora_shrink(activation [M, K], rank_factor, seed? int64 [1], threshold, streams, mask!? uint8 [streams, M, ceil(K / 8)],
//               by_feature) -> partials float32 [P, M, C]
//   by_feature: rank_factor is [C, K], of `streams` projections one after another; otherwise [K, C], without dropout
//
// bfloat16 or float16 on sm_80 and later; rows of unit stride that start on 16 bytes. P is at most 32: partials take
// P·M·C·4 bytes of the caller's pool, no other workspace.

#include "common/checks.h"
#include "common/kernel_table.h"
#include "common/launch.h"
#include "common/operands.h"
#include "ops/lora_linear/shrink_sm80_launch.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>

namespace peft_kernels::lora_shrink {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define ENTRY(T, columns, by_feature)                                            \
  KernelEntry("shrink_sm80<" #T ", " #columns ", " #by_feature ">",              \
              reinterpret_cast<const void*>(&shrink_sm80<T, columns, by_feature>), \
              Shrink<T, columns, by_feature>::kSharedBytes)
#define ENTRIES(T) \
  ENTRY(T, 16, true), ENTRY(T, 16, false), ENTRY(T, 32, true), ENTRY(T, 32, false), ENTRY(T, 64, true), ENTRY(T, 64, false)
const KernelEntry kEntries[] = {ENTRIES(__nv_bfloat16), ENTRIES(__half)};
#undef ENTRIES
#undef ENTRY

constexpr const char* kOp = "lora_shrink";

Tensor lora_shrink(const Tensor& activation, const Tensor& rank_factor, const std::optional<Tensor>& seed, int64_t threshold,
                   int64_t streams, const std::optional<Tensor>& mask, bool by_feature) {
  check_16_bit(kOp, activation, "activation");
  STD_TORCH_CHECK(rank_factor.dim() == 2, kOp, ": expected rank_factor of two dimensions, got ", shape_of(rank_factor));
  const int64_t rows = activation.size(0), K = activation.size(1), columns = rank_factor.size(by_feature ? 0 : 1);
  check_sizes(kOp, {rows, K, columns});
  STD_TORCH_CHECK(1 <= streams && streams <= columns && columns % streams == 0 && (by_feature || streams == 1), kOp,
                  ": expected streams that divide the columns of rank_factor, one if it is by K, got ", streams, " of ",
                  columns);
  check_operand(kOp, activation, "activation", rows, K, activation);
  check_operand(kOp, rank_factor, "rank_factor", by_feature ? columns : K, by_feature ? K : columns, activation);
  STD_TORCH_CHECK(-32768 <= threshold && threshold <= 32768, kOp, ": expected a threshold from -32768 to 32768, got ",
                  threshold);
  if (seed) {
    STD_TORCH_CHECK(by_feature && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, kOp,
                    ": expected seed int64 [1], and rank_factor by feature, got ", shape_of(*seed));
    check_same_device(*seed, "seed", activation);
  }
  if (mask) {
    STD_TORCH_CHECK(seed && mask->dim() == 3 && mask->size(0) == streams && mask->size(1) == rows &&
                        mask->size(2) == (K + 7) / 8 && mask->scalar_type() == ScalarType::Byte &&
                        mask->is_contiguous(),
                    kOp, ": expected a contiguous mask, uint8 [", streams, ", ", rows, ", ", (K + 7) / 8,
                    "], and a seed, got ", shape_of(*mask));
    check_same_device(*mask, "mask", activation);
  }

  const int32_t device = activation.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t width = columns / streams;
  const int64_t blocks = static_cast<int64_t>(tiles_of(rows, kRows)) * streams * tiles_of(width, columns_for(width));
  const int splits = splits_of(K, kBlockK, blocks, processors_of(device));
  Tensor partials = torch::stable::new_empty(activation, {K > 0 ? splits : 0, rows, columns}, ScalarType::Float);
  if (partials.numel() == 0) return partials;

  const Arguments args{
      activation.const_data_ptr(), pitch_of(activation), rank_factor.const_data_ptr(), pitch_of(rank_factor),
      static_cast<float*>(partials.mutable_data_ptr()),
      seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr,
      mask ? static_cast<uint8_t*>(mask->mutable_data_ptr()) : nullptr, static_cast<int32_t>(threshold),
      static_cast<int>(rows), static_cast<int>(K), static_cast<int>(width), static_cast<int>(streams), splits,
      slice_of(K, splits, kBlockK),
  };
  blocks_for(blocks * splits, 1);  // they fit
  const auto launch = activation.scalar_type() == ScalarType::Half
                          ? (by_feature ? &launch_sm80<__half, true> : &launch_sm80<__half, false>)
                          : (by_feature ? &launch_sm80<__nv_bfloat16, true> : &launch_sm80<__nv_bfloat16, false>);
  check_cuda(launch(args, current_stream(device)), "launching lora_shrink");
  return partials;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_native, CUDA, m) { m.impl("lora_shrink", TORCH_BOX(&lora_shrink)); }

}  // namespace peft_kernels::lora_shrink
