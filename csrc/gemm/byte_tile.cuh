// Rows of bytes that may start on any byte, in shared memory by cp.async: masks, whose rows are as long as their columns ask
// for, and biases.
#pragma once

#include "ptx/copy_async.cuh"
#include "common/kernel_source.cuh"

#include <cstdint>

namespace peft_kernels {

// [kHeight, kWidth] bytes. cp.async reads aligned addresses only: a row comes with the bytes that lie before it in its first
// eight, and begins that far behind its place. An allocation starts on eight bytes, so they belong to it.
template <int kHeight, int kWidth>
struct ByteTile {
  static constexpr int kChunk = 8, kChunks = kWidth / kChunk + 1;
  static constexpr int kPitch = kChunks * kChunk, kBytes = kHeight * kPitch;
  static_assert(kWidth % kChunk == 0);

  // Starts the copies of [height, width] bytes at `source`, rows `pitch` apart, as far as they fit; zeros beyond them. `tile`
  // is aligned to 8.
  template <int kThreads>
  PEFT_KERNELS_DEVICE static void copy(char* tile, const void* source, int64_t pitch, int height, int width) {
    if (width > kWidth) width = kWidth;
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < (kHeight * kChunks + kThreads - 1) / kThreads; ++i) {
      const int item = i * kThreads + thread_index(), row = item / kChunks, first = item % kChunks * kChunk;
      const char* from = static_cast<const char*>(source) + (row < height ? row * pitch : 0);
      const int before = before_row(from);
      if (item >= kHeight * kChunks || first >= before + kWidth) continue;  // the last eight of aligned rows
      int bytes = row < height ? before + width - first : 0;
      bytes = bytes < 0 ? 0 : bytes > kChunk ? kChunk : bytes;
      copy_async<kChunk>(tile + item * kChunk, from - before + (bytes > 0 ? first : 0), bytes);
    }
  }

  // A row's first byte, of the same source and pitch.
  PEFT_KERNELS_DEVICE static const char* row(const char* tile, const void* source, int64_t pitch, int row) {
    return tile + row * kPitch + before_row(static_cast<const char*>(source) + row * pitch);
  }

 private:
  PEFT_KERNELS_DEVICE static int before_row(const char* from) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(from) % kChunk);
  }
};

}  // namespace peft_kernels
