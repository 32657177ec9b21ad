// The gradient of a sparse delta's values: dW = dyᵀ·x a tile at a time on the tensor cores, of which only the entries leave
// the block: the gather is in the GEMM's epilogue.
//
//   partials[p][i] = Σ dy[m, row_i]·x[m, column_i] over the p-th part of the tokens, float32
//
// A row's entries in kChunk neighbouring columns are neighbours among the values, as columns ascend: of entries a first kernel
// finds where they begin, of n of m it is arithmetic.
#pragma once

#include "common/host_device.h"
#include "common/kernel_source.cuh"

#include <cstdint>

namespace peft_kernels::sparse_gathered {

constexpr int kChunkColumns = 64;  // of dW, gathered at once
constexpr int kLanes = 8;          // threads of a row: few entries of a row lie in a chunk

// Where entries lie in [rows, columns].
struct Entries {
  const void* starts;      // [rows + 1], of 32 or 64 bits, where each row begins; null: n of m
  bool wide_starts;
  const void* columns;     // of entries, ascending in a row, of 16 or 32 bits; of n of m: in its group, of 8
  int column_bytes;
  const int32_t* begins;   // [rows, chunks + 1] of entries: of each chunk in its row
  int n, m;                // n of every m neighbours of a row
  int rows, width, chunks;

  PEFT_KERNELS_HOST_DEVICE int64_t start(int row) const {
    return wide_starts ? static_cast<const int64_t*>(starts)[row] : static_cast<const int32_t*>(starts)[row];
  }
  PEFT_KERNELS_HOST_DEVICE int held(int64_t i) const {
    return column_bytes == 1   ? static_cast<const int8_t*>(columns)[i]
           : column_bytes == 2 ? static_cast<const int16_t*>(columns)[i]
                               : static_cast<const int32_t*>(columns)[i];
  }
};

struct Arguments {
  const void* dy;  // [tokens, rows of the weight]
  int64_t dy_pitch;
  const void* x;   // [tokens, columns of the weight]
  int64_t x_pitch;
  Entries entries;
  float* partials;  // [parts, count]
  int64_t count;
  int tokens, parts, part;  // tokens of a part: a multiple of a stage's, but for the last
};

// The first of a row's entries from each chunk on, and their number behind the last.
PEFT_KERNELS_DEVICE void find_begin(const Entries& entries, int32_t* begins, int64_t item) {
  const int row = static_cast<int>(item / (entries.chunks + 1)), chunk = static_cast<int>(item % (entries.chunks + 1));
  if (row >= entries.rows) return;
  const int64_t first = entries.start(row), wanted = static_cast<int64_t>(chunk) * kChunkColumns;
  int64_t low = first, high = entries.start(row + 1);
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (entries.held(middle) < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  begins[item] = static_cast<int32_t>(low - first);
}

// Of float32 rows of kChunkColumns or a multiple: threads that hold fragments write pairs of them into different banks.
PEFT_KERNELS_DEVICE int place_of(int row, int column, int pitch) { return row * pitch + (column ^ row % 4 * 8); }

// What a row holds of a chunk: the values [first, last), of which those of n of m may lie beyond it.
struct Range {
  int64_t base, first, last;  // the row's first value
};

// Where kChunks chunks of a row begin among the values: all that is loaded to know it, at once.
template <int kChunks>
struct Begins {
  int64_t base = 0;
  int32_t begins[kChunks + 1] = {};  // of entries

  // Of chunks from `chunk` on.
  PEFT_KERNELS_DEVICE void load(const Entries& entries, int row, int chunk) {
    if (row >= entries.rows || entries.starts == nullptr) return;
    base = entries.start(row);
    const int32_t* from = entries.begins + row * static_cast<int64_t>(entries.chunks + 1);
    PEFT_KERNELS_UNROLL
    for (int i = 0; i <= kChunks; ++i) begins[i] = from[chunk + i < entries.chunks ? chunk + i : entries.chunks];
  }

  // Of chunk `chunk + i`; empty beyond the matrix.
  PEFT_KERNELS_DEVICE Range range(const Entries& entries, int row, int chunk, int i) const {
    if (entries.starts != nullptr) return {base, base + begins[i], base + begins[i + 1]};
    if (row >= entries.rows || chunk + i >= entries.chunks) return {0, 0, 0};
    const int column_0 = (chunk + i) * kChunkColumns, groups = entries.width / entries.m;
    const int behind = (column_0 + kChunkColumns + entries.m - 1) / entries.m;  // groups that the edges cut apart too
    const int64_t first = static_cast<int64_t>(row) * groups * entries.n;
    return {first, first + column_0 / entries.m * entries.n,
            first + static_cast<int64_t>(behind < groups ? behind : groups) * entries.n};
  }
};

// The first of a range's values that this lane takes: what it holds is loaded while something else is done.
PEFT_KERNELS_DEVICE int held_first(const Entries& entries, const Range& range, int lane) {
  return range.first + lane < range.last ? entries.held(range.first + lane) : 0;
}

// Writes the values of a range from sums[place_of(local_row, first column…)]. By kLanes threads, `lane` of them; `held` is
// held_first's.
PEFT_KERNELS_DEVICE void gather(const Arguments& args, const Range& range, int chunk, int lane, int held,
                                const float* sums, int local_row, int local_column, int pitch, int part) {
  const Entries& entries = args.entries;
  for (int64_t i = range.first + lane; i < range.last; i += kLanes) {
    if (i >= range.first + kLanes) held = entries.held(i);
    const int group = entries.starts != nullptr ? 0 : static_cast<int>(i - range.base) / entries.n * entries.m;
    const int column = group + held - chunk * kChunkColumns;
    if (column < 0 || column >= kChunkColumns) continue;
    args.partials[part * args.count + i] = sums[place_of(local_row, local_column + column, pitch)];
  }
}

}  // namespace peft_kernels::sparse_gathered
