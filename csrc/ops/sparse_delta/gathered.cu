// The gradient of entries (gathered.h) as an op: what it takes, then the tile and the parts, then the launches.
//
//   sparse_gathered(dy [M, N], x [M, K], row_starts?, columns, n, m) -> partials float32 [P, nnz]
//   entries: row_starts int32 or int64 [N + 1], columns int16 or int32 [nnz] ascending in a row; n and m are not read
//   n of m:  no row_starts, columns int8 [N, K / m, n], offsets in groups of m
//
// bfloat16 or float16 on sm_80 and later; rows of unit stride that start on 16 bytes. P is at most 32, and 1 where dW has tiles
// for the GPU. Workspace of entries: int32 [N, ceil(K / 64) + 1].

#include "common/checks.h"
#include "common/kernel_table.h"
#include "common/launch.h"
#include "common/operands.h"
#include "ops/sparse_delta/gathered_launch.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>

namespace peft_kernels::sparse_gathered {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define ENTRIES(T)                                                                                               \
  KernelEntry("gathered_sm80<" #T ">", reinterpret_cast<const void*>(&gathered_sm80<T>), Gathered<T>::kSharedBytes), \
      KernelEntry("gathered_sm90<" #T ", BoxWide>", reinterpret_cast<const void*>(&gathered_sm90<T, BoxWide>),     \
                  BoxGathered<T, BoxWide>::kSharedBytes),                                                        \
      KernelEntry("gathered_sm90<" #T ", BoxSquare>", reinterpret_cast<const void*>(&gathered_sm90<T, BoxSquare>), \
                  BoxGathered<T, BoxSquare>::kSharedBytes)
const KernelEntry kEntries[] = {KernelEntry("begins_kernel", reinterpret_cast<const void*>(&begins_kernel)),
                                ENTRIES(__nv_bfloat16), ENTRIES(__half)};
#undef ENTRIES

constexpr const char* kOp = "sparse_gathered";

bool is_integer_of(const Tensor& tensor, ScalarType one, ScalarType other) {
  return tensor.scalar_type() == one || tensor.scalar_type() == other;
}

// Checked, and without where chunks begin.
Entries entries_of(const std::optional<Tensor>& row_starts, const Tensor& columns, int64_t n, int64_t m, int64_t rows,
                   int64_t width, const Tensor& dy) {
  check_same_device(columns, "columns", dy);
  if (row_starts) {
    STD_TORCH_CHECK(row_starts->dim() == 1 && row_starts->size(0) == rows + 1 && row_starts->is_contiguous() &&
                        is_integer_of(*row_starts, ScalarType::Int, ScalarType::Long),
                    kOp, ": expected a contiguous row_starts, int32 or int64 [", rows + 1, "], got ",
                    shape_of(*row_starts), " or another dtype");
    check_same_device(*row_starts, "row_starts", dy);
    STD_TORCH_CHECK(columns.dim() == 1 && columns.is_contiguous() &&
                        is_integer_of(columns, ScalarType::Short, ScalarType::Int),
                    kOp, ": expected contiguous columns, int16 or int32 [nnz], got ", shape_of(columns),
                    " or another dtype");
  } else {
    STD_TORCH_CHECK(1 <= n && n <= m && m <= 128 && width % m == 0, kOp, ": expected 1 <= n <= m <= 128 where m divides ",
                    width, ", got ", n, " of ", m);
    STD_TORCH_CHECK(columns.scalar_type() == ScalarType::Char && columns.is_contiguous() &&
                        columns.numel() == rows * (width / m) * n,
                    kOp, ": expected contiguous offsets, int8 [", rows, ", ", width / m, ", ", n, "], got ",
                    shape_of(columns), " or another dtype");
  }
  Entries entries{};
  if (row_starts) entries.starts = row_starts->const_data_ptr();
  entries.wide_starts = row_starts && row_starts->scalar_type() == ScalarType::Long;
  entries.columns = columns.const_data_ptr();
  entries.column_bytes = static_cast<int>(columns.element_size());
  entries.n = static_cast<int>(n), entries.m = static_cast<int>(m);
  entries.rows = static_cast<int>(rows), entries.width = static_cast<int>(width);
  entries.chunks = tiles_of(width, kChunkColumns);
  return entries;
}

template <typename T>
Status launch(const Arguments& args, TileName tile, int processors, cudaStream_t stream) {
  if (tile == TileName::kBoxWide) return launch_sm90<T, BoxWide>(args, processors, stream);
  if (tile == TileName::kBoxSquare) return launch_sm90<T, BoxSquare>(args, processors, stream);
  return launch_sm80<T>(args, stream);
}

Tensor sparse_gathered(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& row_starts,
                       const Tensor& columns, int64_t n, int64_t m) {
  check_16_bit(kOp, dy, "dy");
  STD_TORCH_CHECK(x.dim() == 2, kOp, ": expected x of two dimensions, got ", shape_of(x));
  const int64_t tokens = dy.size(0), rows = dy.size(1), width = x.size(1), count = columns.numel();
  check_sizes(kOp, {tokens, rows, width});
  check_operand(kOp, dy, "dy", tokens, rows, dy);
  check_operand(kOp, x, "x", tokens, width, dy);
  Entries entries = entries_of(row_starts, columns, n, m, rows, width, dy);

  const int32_t device = dy.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  if (tokens == 0 || count == 0) return torch::stable::new_empty(dy, {0, count}, ScalarType::Float);  // zeros, summed up

  // The tile by the size of dW; where it has too few of them, each is summed in parts.
  const int processors = processors_of(device);
  const bool boxes = has_boxes(device);
  TileName tile = choose(rows, width, processors, boxes);
  if (boxes && tile != TileName::kBoxWide) tile = TileName::kBoxSquare;
  const int64_t tiles =
      tile == TileName::kBoxWide     ? clusters_of<BoxWide>(rows, width) * BoxWide::kCluster
      : tile == TileName::kBoxSquare ? clusters_of<BoxSquare>(rows, width) * BoxSquare::kCluster
                                     : static_cast<int64_t>(tiles_of(rows, Square::kRows)) * tiles_of(width, Square::kColumns);
  constexpr int kStage = 64;
  const int parts = splits_of(tokens, kStage, tiles, boxes ? processors / 2 : processors);
  blocks_for(tiles * parts, 1);  // they fit

  Tensor partials = torch::stable::new_empty(dy, {parts, count}, ScalarType::Float);
  std::optional<Tensor> begins;
  if (row_starts) {
    begins = torch::stable::new_empty(dy, {rows, entries.chunks + 1}, ScalarType::Int);
    auto* found = static_cast<int32_t*>(begins->mutable_data_ptr());
    check_cuda(launch_begins(entries, found, stream), "launching begins_kernel");
    entries.begins = found;
  }
  const Arguments args{dy.const_data_ptr(),
                       pitch_of(dy),
                       x.const_data_ptr(),
                       pitch_of(x),
                       entries,
                       static_cast<float*>(partials.mutable_data_ptr()),
                       count,
                       static_cast<int>(tokens),
                       parts,
                       slice_of(tokens, parts, kStage)};
  const auto call = dy.scalar_type() == ScalarType::Half ? &launch<__half> : &launch<__nv_bfloat16>;
  check_cuda(call(args, tile, processors, stream), "launching sparse_gathered");
  return partials;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_native, CUDA, m) { m.impl("sparse_gathered", TORCH_BOX(&sparse_gathered)); }

}  // namespace peft_kernels::sparse_gathered
