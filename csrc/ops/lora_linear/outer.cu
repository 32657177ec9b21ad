// The outer products (outer.h) as an op: what it takes, then in how many parts, then the launch.
//
//   lora_outer(activation [M, F], rank_factor [M, R], lora_B? [F, R], dropout_mask? uint8 [masks, M, ceil(F / 8)], streams,
//              transposed)
//     -> sums float32 [P, F, R], or [P, R, F] where transposed; shrunk float32 [ceil(F / 128), M, R], empty without lora_B
//   of several streams rank_factor has R / streams columns each, a multiple of 8, and sums are transposed; a mask is for the next
//   streams / masks of them
//
// bfloat16 or float16 on sm_80 and later, R up to 64 a stream, up to 32 with lora_B; rows of unit stride that start on 16 bytes. P is at most 32. The
// results are all that is allocated.

#include "common/checks.h"
#include "common/kernel_table.h"
#include "common/launch.h"
#include "common/operands.h"
#include "ops/lora_linear/calls.h"
#include "ops/lora_linear/outer_sm80_launch.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace peft_kernels::lora_outer {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define ENTRY(T, width, shrinks)                                                \
  KernelEntry("outer_sm80<" #T ", " #width ", " #shrinks ">",                   \
              reinterpret_cast<const void*>(&outer_sm80<T, width, shrinks>), \
              Outer<T, width, shrinks>::kSharedBytes)
#define ENTRIES(T) \
  ENTRY(T, 16, true), ENTRY(T, 16, false), ENTRY(T, 32, true), ENTRY(T, 32, false), ENTRY(T, 64, false)
const KernelEntry kEntries[] = {ENTRIES(__nv_bfloat16), ENTRIES(__half)};
#undef ENTRIES
#undef ENTRY

constexpr const char* kOp = "lora_outer";

}  // namespace

Call::Call(const Tensor& activation, const Tensor& rank_factor, const std::optional<Tensor>& lora_B,
           const std::optional<Tensor>& dropout_mask, int64_t streams, bool transposed) {
  check_16_bit(kOp, activation, "activation");
  STD_TORCH_CHECK(rank_factor.dim() == 2, kOp, ": expected rank_factor of two dimensions, got ", shape_of(rank_factor));
  const int64_t rows = activation.size(0), columns = activation.size(1), all = rank_factor.size(1);
  check_sizes(kOp, {rows, columns});
  STD_TORCH_CHECK(!dropout_mask || dropout_mask->dim() == 3, kOp, ": expected a dropout_mask of three dimensions, got ",
                  shape_of(*dropout_mask));
  STD_TORCH_CHECK(streams == 1 || (streams > 1 && transposed && !lora_B && all % (8 * streams) == 0), kOp,
                  ": expected one stream, or of several a multiple of 8 columns of rank_factor each, transposed sums and no lora_B, "
                  "got ", streams, " of ", all);
  const int64_t masks = dropout_mask ? dropout_mask->size(0) : 1;
  STD_TORCH_CHECK(masks > 0 && streams % masks == 0, kOp, ": expected masks that divide the ", streams, " streams, got ",
                  masks);
  const int64_t width = all / streams;
  const int64_t most = lora_B ? kLargestWidthToShrink : kLargestWidth;
  STD_TORCH_CHECK(width <= most, kOp, ": expected a rank of at most ", most, lora_B ? " with lora_B" : "", ", got ", width);
  check_operand(kOp, activation, "activation", rows, columns, activation);
  check_operand(kOp, rank_factor, "rank_factor", rows, all, activation);
  if (lora_B) check_operand(kOp, *lora_B, "lora_B", columns, width, activation);
  if (dropout_mask) {
    STD_TORCH_CHECK(!lora_B && dropout_mask->size(1) == rows && dropout_mask->size(2) == (columns + 7) / 8 &&
                        dropout_mask->scalar_type() == ScalarType::Byte && dropout_mask->is_contiguous(),
                    kOp, ": expected a contiguous dropout_mask, uint8 [", masks, ", ", rows, ", ", (columns + 7) / 8,
                    "], and no lora_B, got ", shape_of(*dropout_mask));
    check_same_device(*dropout_mask, "dropout_mask", activation);
  }

  dtype_ = activation.scalar_type(), device_ = activation.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device_);
  const bool empty = rows == 0 || columns == 0 || width == 0;
  const int slices = tiles_of(columns, kSlice);
  // No parts add up to zeros.
  const int parts = empty ? 0 : splits_of(rows, kRows, slices * streams, processors_of(device_));
  sums_ = torch::stable::new_empty(activation, {parts, transposed ? all : columns, transposed ? columns : all},
                                   ScalarType::Float);
  shrunk_ = torch::stable::new_empty(activation, {lora_B ? slices : 0, rows, width}, ScalarType::Float);
  if (empty) return;

  args_ = {
      activation.const_data_ptr(), pitch_of(activation), rank_factor.const_data_ptr(), pitch_of(rank_factor),
      lora_B ? lora_B->const_data_ptr() : nullptr, lora_B ? pitch_of(*lora_B) : 0,
      dropout_mask ? static_cast<const uint8_t*>(dropout_mask->const_data_ptr()) : nullptr,
      static_cast<float*>(sums_.mutable_data_ptr()), static_cast<float*>(shrunk_.mutable_data_ptr()),
      static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(width), static_cast<int>(streams),
      static_cast<int>(masks), parts,
      slice_of(rows, parts, kRows), transposed,
  };
  blocks_for(blocks_of(args_), 1);  // they fit
}

void Call::launch(bool beside) const {
  if (args_.parts == 0) return;
  const bool shrinks = args_.lora_B != nullptr;
  const auto call = dtype_ == ScalarType::Half
                        ? (shrinks ? &launch_sm80<__half, true> : &launch_sm80<__half, false>)
                        : (shrinks ? &launch_sm80<__nv_bfloat16, true> : &launch_sm80<__nv_bfloat16, false>);
  const torch::stable::accelerator::DeviceGuard guard(device_);
  check_cuda(call(args_, current_stream(device_), beside), "launching lora_outer");
}

namespace {

std::tuple<Tensor, Tensor> lora_outer(const Tensor& activation, const Tensor& rank_factor, const std::optional<Tensor>& lora_B,
                                      const std::optional<Tensor>& dropout_mask, int64_t streams, bool transposed) {
  const Call call(activation, rank_factor, lora_B, dropout_mask, streams, transposed);
  call.launch();
  return {call.sums(), call.shrunk()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_native, CUDA, m) { m.impl("lora_outer", TORCH_BOX(&lora_outer)); }

}  // namespace peft_kernels::lora_outer
