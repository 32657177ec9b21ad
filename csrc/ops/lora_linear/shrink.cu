// The shrink (shrink.h) as an op: what it takes, then in how many parts, then the launch.
//
//   lora_shrink(wide [M, K], narrow, seed? int64 [1], threshold, streams, mask!? uint8 [streams, M, ceil(K / 8)],
//               by_feature) -> partials float32 [P, M, C]
//   by_feature: narrow is [C, K], of `streams` projections one after another; otherwise [K, C], without dropout
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

Tensor lora_shrink(const Tensor& wide, const Tensor& narrow, const std::optional<Tensor>& seed, int64_t threshold,
                   int64_t streams, const std::optional<Tensor>& mask, bool by_feature) {
  check_16_bit(kOp, wide, "wide");
  STD_TORCH_CHECK(narrow.dim() == 2, kOp, ": expected narrow of two dimensions, got ", shape_of(narrow));
  const int64_t rows = wide.size(0), depth = wide.size(1), columns = narrow.size(by_feature ? 0 : 1);
  check_sizes(kOp, {rows, depth, columns});
  STD_TORCH_CHECK(1 <= streams && streams <= columns && columns % streams == 0 && (by_feature || streams == 1), kOp,
                  ": expected streams that divide the columns of narrow, one if it is by depth, got ", streams, " of ",
                  columns);
  check_operand(kOp, wide, "wide", rows, depth, wide);
  check_operand(kOp, narrow, "narrow", by_feature ? columns : depth, by_feature ? depth : columns, wide);
  STD_TORCH_CHECK(-32768 <= threshold && threshold <= 32768, kOp, ": expected a threshold from -32768 to 32768, got ",
                  threshold);
  if (seed) {
    STD_TORCH_CHECK(by_feature && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, kOp,
                    ": expected seed int64 [1], and narrow by feature, got ", shape_of(*seed));
    check_same_device(*seed, "seed", wide);
  }
  if (mask) {
    STD_TORCH_CHECK(seed && mask->dim() == 3 && mask->size(0) == streams && mask->size(1) == rows &&
                        mask->size(2) == (depth + 7) / 8 && mask->scalar_type() == ScalarType::Byte &&
                        mask->is_contiguous(),
                    kOp, ": expected a contiguous mask, uint8 [", streams, ", ", rows, ", ", (depth + 7) / 8,
                    "], and a seed, got ", shape_of(*mask));
    check_same_device(*mask, "mask", wide);
  }

  const int32_t device = wide.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t width = columns / streams;
  const int64_t blocks = static_cast<int64_t>(tiles_of(rows, kRows)) * streams * tiles_of(width, columns_for(width));
  const int splits = parts_of(depth, kDepth, blocks, processors_of(device));
  Tensor partials = torch::stable::new_empty(wide, {depth > 0 ? splits : 0, rows, columns}, ScalarType::Float);
  if (partials.numel() == 0) return partials;

  const Arguments args{
      wide.const_data_ptr(), pitch_of(wide), narrow.const_data_ptr(), pitch_of(narrow),
      static_cast<float*>(partials.mutable_data_ptr()),
      seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr,
      mask ? static_cast<uint8_t*>(mask->mutable_data_ptr()) : nullptr, static_cast<int32_t>(threshold),
      static_cast<int>(rows), static_cast<int>(depth), static_cast<int>(width), static_cast<int>(streams), splits,
      part_of(depth, splits, kDepth),
  };
  blocks_for(blocks * splits, 1);  // they fit
  const auto launch = wide.scalar_type() == ScalarType::Half
                          ? (by_feature ? &launch_sm80<__half, true> : &launch_sm80<__half, false>)
                          : (by_feature ? &launch_sm80<__nv_bfloat16, true> : &launch_sm80<__nv_bfloat16, false>);
  check_cuda(launch(args, current_stream(device)), "launching lora_shrink");
  return partials;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_native, CUDA, m) { m.impl("lora_shrink", TORCH_BOX(&lora_shrink)); }

}  // namespace peft_kernels::lora_shrink
