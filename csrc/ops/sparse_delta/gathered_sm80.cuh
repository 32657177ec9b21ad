// Device code of the gradient of entries for sm_80 and later. A tile of dW a block; bound by the tensor cores.
#pragma once

#include "common/kernel_source.cuh"
#include "gemm/mainloop_sm80.cuh"
#include "ops/sparse_delta/gathered.h"

namespace peft_kernels::sparse_gathered {

template <typename T>
struct Gathered : private WarpProduct<T, Square, false, false> {
  using Product = WarpProduct<T, Square, false, false>;
  using Tile = Square;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kSumsBytes = Tile::kRows * Tile::kColumns * 4;  // in place of the stages
  static constexpr int kSharedBytes = Product::kStagesBytes > kSumsBytes ? Product::kStagesBytes : kSumsBytes;

  static int64_t blocks_of(const Arguments& args) {
    return static_cast<int64_t>(tiles_of(args.entries.rows, Tile::kRows)) *
           tiles_of(args.entries.width, Tile::kColumns) * args.parts;
  }

  PEFT_KERNELS_DEVICE static void run(const Arguments& args, char* shared) {
    const Entries& entries = args.entries;
    const int tiles = tiles_of(entries.rows, Tile::kRows) * tiles_of(entries.width, Tile::kColumns);
    const int part = block_index() / tiles, token_0 = part * args.part;
    const int end = args.tokens - token_0 < args.part ? args.tokens : token_0 + args.part;
    const TileCoordinate tile = swizzled_tile(block_index() % tiles, entries.rows, entries.width, Tile::kRows, Tile::kColumns);
    const int row_0 = tile.row * Tile::kRows, column_0 = tile.column * Tile::kColumns;
    const Operands operands{args.dy, args.dy_pitch, args.x, args.x_pitch, entries.rows, entries.width, end};

    typename Product::Sums sums = {};
    const auto fetch = [&](int stage, char* place) {
      Product::fetch(place, operands, row_0, column_0, token_0 + stage * Tile::kBlockK);
    };
    const auto use = [&](int, const char* place) {
      PEFT_KERNELS_UNROLL
      for (int step = 0; step < Product::kSteps; ++step) Product::multiply(place, step, sums);
    };
    Product::each_stage(shared, tiles_of(end - token_0, Tile::kBlockK), fetch, use);

    float* tile_sums = reinterpret_cast<float*>(shared);
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < Product::kFragmentRows; ++i) {
      PEFT_KERNELS_UNROLL
      for (int j = 0; j < Product::kFragmentColumns; ++j) {
        PEFT_KERNELS_UNROLL
        for (int half = 0; half < 2; ++half) {
          struct alignas(8) Pair {
            float values[2];
          };
          const int place = place_of(Product::row_of(i, half), Product::column_of(j), Tile::kColumns);
          *reinterpret_cast<Pair*>(tile_sums + place) = {{sums[i][j][2 * half], sums[i][j][2 * half + 1]}};
        }
      }
    }
    // The sums' registers are free: where this thread's rows begin, then what they hold first, is loaded all at once.
    constexpr int kRowsAtOnce = kThreads / kLanes, kRows = Tile::kRows / kRowsAtOnce;
    constexpr int kChunks = Tile::kColumns / kChunkColumns;
    const int lane = thread_index() % kLanes, chunk_0 = column_0 / kChunkColumns;
    const auto local = [](int i) { return i * kRowsAtOnce + thread_index() / kLanes; };
    Begins<kChunks> begins[kRows];
    int held[kRows][kChunks];
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < kRows; ++i) begins[i].load(entries, row_0 + local(i), chunk_0);
    const auto range = [&](int i, int chunk) { return begins[i].range(entries, row_0 + local(i), chunk_0, chunk); };
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      PEFT_KERNELS_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk) held[i][chunk] = held_first(entries, range(i, chunk), lane);
    }
    sync_block();
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      PEFT_KERNELS_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        gather(args, range(i, chunk), chunk_0 + chunk, lane, held[i][chunk], tile_sums, local(i), chunk * kChunkColumns,
               Tile::kColumns, part);
      }
    }
  }
};

}  // namespace peft_kernels::sparse_gathered
