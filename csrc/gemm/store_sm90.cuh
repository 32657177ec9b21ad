// A finished tile of the kernels for sm_90a: its way from registers to memory, by the copy engine.
#pragma once

#include "common/kernel_source.cuh"
#include "ptx/tensor_copy.cuh"

namespace peft_kernels {

// Shared memory that it takes: two boxes of 64 rows for each warpgroup.
template <typename Product>
constexpr int kOutBytes = 2 * Product::kGroups * Product::kGroupRows * kBoxRowBytes;

// out = sums, 64 columns at a time. The engine stores them while the next ones are rounded, and while the next tile is
// multiplied: `boxes` have been read when the first thread of each warpgroup has waited for its stores.
template <typename T, typename Product>
PEFT_KERNELS_DEVICE void store_tile(const TensorMap& out, char* boxes, int row_0, int column_0,
                                    const float (&sums)[Product::kSums]) {
  constexpr int kParts = Product::kSums * 2 / kBoxColumns, kBoxBytes = Product::kGroupRows * kBoxRowBytes;
  const int row = Product::row_of_group(), lane = Product::lane();
  PEFT_KERNELS_UNROLL
  for (int part = 0; part < kParts; ++part) {
    char* box = boxes + (2 * Product::group() + part % 2) * kBoxBytes;
    if (Product::is_first()) stores_wait<1>();
    Product::sync_group();  // the box has been read
    PEFT_KERNELS_UNROLL
    for (int j = 0; j < kBoxColumns / 8; ++j) {
      const int fragment = part * kBoxColumns / 8 + j;
      PEFT_KERNELS_UNROLL
      for (int half = 0; half < 2; ++half) {
        struct alignas(4) Pair {
          T values[2];
        };
        const float* pair = sums + 4 * fragment + 2 * half;
        *reinterpret_cast<Pair*>(box + box_offset(row + 8 * half, j) + 4 * (lane % 4)) = {
            {T(pair[0]), T(pair[1])}};
      }
    }
    publish_to_copies();
    Product::sync_group();
    if (Product::is_first()) store_box(out, row_0, column_0 + part * kBoxColumns, box);
  }
}

}  // namespace peft_kernels
