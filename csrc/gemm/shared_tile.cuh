// Tiles of 16-bit elements in shared memory, as cp.async brings them and ldmatrix reads them.
#pragma once

#include "ptx/copy_async.cuh"
#include "common/kernel_source.cuh"

#include <cstdint>

namespace peft_kernels {

constexpr int kChunk = 8;  // elements in 16 bytes: of one copy, and of a row of ldmatrix
constexpr int kFragment = 16;

// [kHeight, kWidth] elements in shared memory. Which 16 bytes of a row come first depends on the row, so that eight rows
// of one column lie in eight different banks.
template <int kHeight, int kWidth>
struct SharedTile {
  static constexpr int kChunks = kWidth / kChunk;
  static constexpr int kBytes = kHeight * kWidth * 2;
  static_assert(kChunks == 2 || kChunks == 4 || kChunks % 8 == 0);

  PEFT_KERNELS_DEVICE static int offset(int row, int chunk) {
    constexpr int kRowsOf128Bytes = kChunks < 8 ? 8 / kChunks : 1, kSwizzled = kChunks < 8 ? kChunks : 8;
    return (row * kChunks + (chunk ^ (row / kRowsOf128Bytes % kSwizzled))) * 16;
  }

  // The part of source [height, width] that starts at (row_0, column_0); zeros beyond its ends.
  template <int kThreads>
  PEFT_KERNELS_DEVICE static void copy(char* tile, const void* source, int64_t pitch, int row_0, int height,
                                       int column_0, int width) {
    static_assert(kHeight * kChunks % kThreads == 0 || kHeight * kChunks < kThreads);
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < (kHeight * kChunks + kThreads - 1) / kThreads; ++i) {
      const int item = i * kThreads + thread_index(), row = item / kChunks, chunk = item % kChunks;
      if (kHeight * kChunks < kThreads && item >= kHeight * kChunks) break;
      const int column = column_0 + chunk * kChunk;
      int elements = width - column;
      elements = row_0 + row >= height || elements < 0 ? 0 : elements > kChunk ? kChunk : elements;
      const auto* from = static_cast<const uint16_t*>(source);
      if (elements > 0) from += (row_0 + row) * pitch + column;
      copy_async<16>(tile + offset(row, chunk), from, elements * 2);
    }
  }
};

// Zeros in place of the elements of a chunk whose bit is not set.
PEFT_KERNELS_DEVICE void keep_in_chunk(char* chunk, unsigned bits) {
  struct alignas(16) Elements {
    uint16_t values[kChunk];
  };
  Elements kept = *reinterpret_cast<const Elements*>(chunk);
  PEFT_KERNELS_UNROLL
  for (int k = 0; k < kChunk; ++k) kept.values[k] = bits >> k & 1 ? kept.values[k] : uint16_t{0};
  *reinterpret_cast<Elements*>(chunk) = kept;
}

}  // namespace peft_kernels
