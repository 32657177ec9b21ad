// Device code of the shrink for sm_80 and later: cp.async in several stages, ldmatrix, mma. Bound by the bandwidth of
// reading `activation` once, with dropout by Philox's integer multiplications too. A block owns kRows rows, up to kColumns
// columns of a stream, and one part of K.
#pragma once

#include "ptx/copy_async.cuh"
#include "common/kernel_source.cuh"
#include "ptx/load_matrices.cuh"
#include "ptx/mma.cuh"
#include "gemm/shared_tile.cuh"
#include "gemm/tiles.h"
#include "ops/dropout/philox.h"
#include "ops/lora_linear/shrink.h"

#include <cstdint>

namespace peft_kernels::lora_shrink {

constexpr int kRows = 64, kBlockK = 64, kStages = 3;
constexpr int kThreads = 128;  // a warp has 16 rows

// The columns of a block, as many as the rank asks for: `activation` is read once for up to 64.
PEFT_KERNELS_HOST_DEVICE int columns_for(int64_t width) { return width <= 16 ? 16 : width <= 32 ? 32 : 64; }

// Blocks that a launch takes; columns of one row block and part come one after another, so that they meet in the L2 cache.
template <int kColumns>
PEFT_KERNELS_HOST_DEVICE int64_t blocks_of(const Arguments& args) {
  return static_cast<int64_t>(args.splits) * tiles_of(args.rows, kRows) * args.streams * tiles_of(args.width, kColumns);
}

template <typename T, int kColumns, bool kByFeature>
struct Shrink {
  using Wide = SharedTile<kRows, kBlockK>;
  using Narrow = SharedTile<kByFeature ? kColumns : kBlockK, kByFeature ? kBlockK : kColumns>;
  static constexpr int kStageBytes = Wide::kBytes + Narrow::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  using Accumulators = float[kColumns / 8][4];

  PEFT_KERNELS_DEVICE static void run(const Arguments& args, char* shared) {
    const int across = tiles_of(args.width, kColumns), groups = args.streams * across;
    const int column_group = block_index() % groups, row_block = block_index() / groups % tiles_of(args.rows, kRows);
    const int split = block_index() / groups / tiles_of(args.rows, kRows);
    const Place place{row_block * kRows, column_group / across, column_group % across * kColumns, split * args.part};
    const int end = args.K - place.k < args.part ? args.K : place.k + args.part;
    const int stages = tiles_of(end - place.k, kBlockK);
    const uint64_t seed = args.seed == nullptr ? 0 : static_cast<uint64_t>(*args.seed);  // once, ahead of all waits
    Accumulators sums = {};

    PEFT_KERNELS_UNROLL
    for (int stage = 0; stage < kStages - 1; ++stage) fetch(args, shared, place, stage, stages, end);
    for (int stage = 0; stage < stages; ++stage) {
      copy_async_wait<kStages - 2>();
      sync_block();  // this stage has arrived, and the one before it is read: its place is free
      fetch(args, shared, place, stage + kStages - 1, stages, end);
      char* tile = shared + stage % kStages * kStageBytes;
      if (args.seed != nullptr) {
        drop(args, seed, tile, place, place.k + stage * kBlockK);
        sync_block();
      }
      multiply(tile, sums);
    }
    store(args, place, split, sums);
  }

 private:
  // Where a block begins.
  struct Place {
    int row, stream, column, k;  // column: of its stream
  };

  PEFT_KERNELS_DEVICE static int lane() { return thread_index() % 32; }
  PEFT_KERNELS_DEVICE static int warp_row() { return thread_index() / 32 * 16; }

  // Starts the copies of a stage; past the last one an empty group, so that waiting counts alike.
  PEFT_KERNELS_DEVICE static void fetch(const Arguments& args, char* shared, const Place& place, int stage, int stages,
                                        int end) {
    if (stage < stages) {
      char* tile = shared + stage % kStages * kStageBytes;
      const int k_0 = place.k + stage * kBlockK, first = place.stream * args.width;
      Wide::template copy<kThreads>(tile, args.activation, args.activation_pitch, place.row, args.rows, k_0, end);
      tile += Wide::kBytes;
      if constexpr (kByFeature) {
        Narrow::template copy<kThreads>(tile, args.rank_factor, args.rank_factor_pitch, first + place.column, first + args.width,
                                        k_0, end);
      } else {
        Narrow::template copy<kThreads>(tile, args.rank_factor, args.rank_factor_pitch, k_0, end, place.column, args.width);
      }
    }
    copy_async_commit();
  }

  // Zero what is dropped of a stage: eight neighbours of a row at a time, whose draws are one call of Philox.
  PEFT_KERNELS_DEVICE static void drop(const Arguments& args, uint64_t seed, char* tile, const Place& place,
                                       int k_0) {
    const int64_t bytes = (args.K + 7) / 8;
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < kRows * Wide::kChunks / kThreads; ++i) {
      const int item = i * kThreads + thread_index(), chunk = item % Wide::kChunks;
      const int64_t row = place.row + item / Wide::kChunks;
      const uint32_t group = static_cast<uint32_t>(k_0 / kChunk + chunk);
      const uint8_t kept =
          dropout::kept_byte(seed, row, group, static_cast<uint32_t>(place.stream), args.threshold);
      keep_in_chunk(tile + Wide::offset(item / Wide::kChunks, chunk), kept);
      if (args.mask != nullptr && place.column == 0 && row < args.rows && group < bytes) {
        args.mask[(place.stream * static_cast<int64_t>(args.rows) + row) * bytes + group] = kept;
      }
    }
  }

  PEFT_KERNELS_DEVICE static void multiply(const char* tile, Accumulators& sums) {
    PEFT_KERNELS_UNROLL
    for (int step = 0; step < kBlockK / kFragment; ++step) {
      uint32_t a[4];
      load_matrices<false>(a, tile + Wide::offset(warp_row() + lane() % 16, 2 * step + lane() / 16));
      PEFT_KERNELS_UNROLL
      for (int j = 0; j < kColumns / 16; ++j) {
        uint32_t b[4];
        if constexpr (kByFeature) {
          const int row = 16 * j + lane() % 8 + lane() / 16 * 8;
          load_matrices<false>(b, tile + Wide::kBytes + Narrow::offset(row, 2 * step + lane() / 8 % 2));
        } else {
          const int row = 16 * step + lane() % 16;
          load_matrices<true>(b, tile + Wide::kBytes + Narrow::offset(row, 2 * j + lane() / 16));
        }
        mma_m16n8k16<T>(sums[2 * j], a, b[0], b[1]);
        mma_m16n8k16<T>(sums[2 * j + 1], a, b[2], b[3]);
      }
    }
  }

  PEFT_KERNELS_DEVICE static void store(const Arguments& args, const Place& place, int split, const Accumulators& sums) {
    const int64_t all = static_cast<int64_t>(args.streams) * args.width;
    PEFT_KERNELS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = place.row + warp_row() + 8 * half + lane() / 4;
      if (row >= args.rows) continue;
      float* to = args.partials + (split * static_cast<int64_t>(args.rows) + row) * all + place.stream * args.width;
      PEFT_KERNELS_UNROLL
      for (int j = 0; j < kColumns / 8; ++j) {
        PEFT_KERNELS_UNROLL
        for (int k = 0; k < 2; ++k) {
          const int column = place.column + 8 * j + 2 * (lane() % 4) + k;
          if (column < args.width) to[column] = sums[j][2 * half + k];
        }
      }
    }
  }
};

}  // namespace peft_kernels::lora_shrink
