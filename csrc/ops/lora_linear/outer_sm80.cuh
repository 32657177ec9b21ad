// Device code of the outer products for sm_80 and later: cp.async in several stages, ldmatrix, mma. Bound by the bandwidth
// of reading `activation` once. A block owns kSlice columns, all ranks of a stream, and one part of the rows, which it reads kRows at a
// time; the streams' blocks of the same columns follow one another, and meet in the L2 cache.
#pragma once

#include "gemm/byte_tile.cuh"
#include "ptx/copy_async.cuh"
#include "ptx/grid_dependency.cuh"
#include "common/kernel_source.cuh"
#include "ptx/load_matrices.cuh"
#include "ptx/mma.cuh"
#include "gemm/shared_tile.cuh"
#include "gemm/tiles.h"
#include "ops/lora_linear/outer.h"

#include <cstdint>

namespace peft_kernels::lora_outer {

constexpr int kRows = 64, kSlice = 128, kStages = 3;
constexpr int kThreads = 128;
constexpr int kWarpColumns = kSlice / 4;  // of sums; of shrunk a warp has 16 rows

PEFT_KERNELS_HOST_DEVICE int64_t blocks_of(const Arguments& args) {
  return static_cast<int64_t>(args.parts) * args.streams * tiles_of(args.columns, kSlice);
}

// kWidth: the rank, rounded up. kShrinks: shrunk too.
template <typename T, int kWidth, bool kShrinks>
struct Outer {
  using Wide = SharedTile<kRows, kSlice>;
  using Narrow = SharedTile<kRows, kWidth>;
  using Right = SharedTile<kSlice, kWidth>;
  using Keep = ByteTile<kRows, kSlice / 8>;  // of a stage
  static constexpr int kStageBytes = Wide::kBytes + Narrow::kBytes;
  static constexpr int kStagesBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kStagesBytes + (kShrinks ? Right::kBytes : kStages * Keep::kBytes);
  using Sums = float[kWarpColumns / 16][kWidth / 8][4];

  // What these take of it: `lora_B`, or the stages' masks, lie behind the stages. There are never both.
  static int shared_bytes(const Arguments& args) {
    return args.lora_B != nullptr || args.dropout_mask != nullptr ? kSharedBytes : kStagesBytes;
  }

  PEFT_KERNELS_DEVICE static void run(const Arguments& args, char* shared) {
    const int slices = tiles_of(args.columns, kSlice);
    const int stream = block_index() % args.streams, slice = block_index() / args.streams % slices;
    const int part = block_index() / args.streams / slices;
    const int column_0 = slice * kSlice, row_0 = part * args.part;
    const int end = args.rows - row_0 < args.part ? args.rows : row_0 + args.part;
    const int stages = tiles_of(end - row_0, kRows);
    const int64_t mask_pitch = (args.columns + 7) / 8;
    const int mask = stream / (args.streams / args.masks);
    const uint8_t* dropout_mask = args.dropout_mask == nullptr ? nullptr
                                               : args.dropout_mask + (static_cast<int64_t>(mask) * args.rows + row_0) * mask_pitch +
                                                     column_0 / 8;  // of this block
    char* lora_B = shared + kStagesBytes;
    char* kept = shared + kStagesBytes;
    // Starts the copies of a stage; past the last one an empty group, so that waiting counts alike.
    const auto fetch = [&](int stage) {
      if (stage < stages) {
        const int row = stage * kRows, place = stage % kStages;
        copy_stage(args, shared + place * kStageBytes, stream, row_0 + row, end, column_0);
        if (!kShrinks && dropout_mask != nullptr) {
          Keep::template copy<kThreads>(kept + place * Keep::kBytes, dropout_mask + row * mask_pitch, mask_pitch,
                                        end - row_0 - row, static_cast<int>(mask_pitch) - column_0 / 8);
        }
      }
      copy_async_commit();
    };
    Sums sums = {};

    if constexpr (kShrinks) {  // arrives with the first stage
      Right::template copy<kThreads>(lora_B, args.lora_B, args.lora_B_pitch, column_0, args.columns, 0, args.width);
    }
    PEFT_KERNELS_UNROLL
    for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage);
    for (int stage = 0; stage < stages; ++stage) {
      copy_async_wait<kStages - 2>();
      sync_block();  // this stage has arrived, and the one before it is read: its place is free
      fetch(stage + kStages - 1);
      char* tile = shared + stage % kStages * kStageBytes;
      if (!kShrinks && dropout_mask != nullptr) {
        drop(tile, kept + stage % kStages * Keep::kBytes, dropout_mask + stage * kRows * mask_pitch, mask_pitch);
        sync_block();
      }
      if constexpr (kShrinks) shrink(args, tile, lora_B, slice, row_0 + stage * kRows, end);
      multiply(tile, sums);
    }
    store(args, part * args.streams + stream, column_0, sums);
    // One block is enough, the last to start: others make room.
    if (block_index() == block_count() - 1) wait_for_previous_grid();
  }

 private:
  PEFT_KERNELS_DEVICE static int lane() { return thread_index() % 32; }
  PEFT_KERNELS_DEVICE static int warp() { return thread_index() / 32; }

  PEFT_KERNELS_DEVICE static void copy_stage(const Arguments& args, char* tile, int stream, int row, int end,
                                             int column_0) {
    Wide::template copy<kThreads>(tile, args.activation, args.activation_pitch, row, end, column_0, args.columns);
    Narrow::template copy<kThreads>(tile + Wide::kBytes, args.rank_factor, args.rank_factor_pitch, row, end, stream * args.width,
                                    (stream + 1) * args.width);
  }

  // Zero what dropout dropped of a stage, eight neighbours of a row at a time; its mask came with it from `dropout_mask`.
  PEFT_KERNELS_DEVICE static void drop(char* tile, const char* kept, const uint8_t* dropout_mask, int64_t mask_pitch) {
    PEFT_KERNELS_UNROLL_BY_4
    for (int i = 0; i < kRows * Wide::kChunks / kThreads; ++i) {
      const int item = i * kThreads + thread_index(), row = item / Wide::kChunks, chunk = item % Wide::kChunks;
      keep_in_chunk(tile + Wide::offset(row, chunk),
                    static_cast<uint8_t>(Keep::row(kept, dropout_mask, mask_pitch, row)[chunk]));
    }
  }

  // Two fragments of eight ranks, from element 16·step of K on.
  PEFT_KERNELS_DEVICE static void load_ranks(uint32_t (&b)[4], const char* tile, int step, int j) {
    load_matrices<true>(b, tile + Narrow::offset(16 * step + lane() % 16, 2 * j + lane() / 16));
  }

  // sums += activationᵀ·rank_factor of a stage: activation's rows are K, so its fragments are loaded transposed.
  PEFT_KERNELS_DEVICE static void multiply(const char* tile, Sums& sums) {
    PEFT_KERNELS_UNROLL
    for (int step = 0; step < kRows / kFragment; ++step) {
      uint32_t a[kWarpColumns / 16][4];
      PEFT_KERNELS_UNROLL
      for (int i = 0; i < kWarpColumns / 16; ++i) {
        const int row = 16 * step + lane() % 8 + lane() / 16 * 8;
        const int chunk = (warp() * kWarpColumns + 16 * i) / kChunk + lane() / 8 % 2;
        load_matrices<true>(a[i], tile + Wide::offset(row, chunk));
      }
      PEFT_KERNELS_UNROLL
      for (int j = 0; j < kWidth / 16; ++j) {
        uint32_t b[4];
        load_ranks(b, tile + Wide::kBytes, step, j);
        PEFT_KERNELS_UNROLL
        for (int i = 0; i < kWarpColumns / 16; ++i) {
          mma_m16n8k16<T>(sums[i][2 * j], a[i], b[0], b[1]);
          mma_m16n8k16<T>(sums[i][2 * j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  // shrunk = activation·lora_B of a stage, this slice's share of it.
  PEFT_KERNELS_DEVICE static void shrink(const Arguments& args, const char* tile, const char* lora_B, int slice,
                                         int row_0, int end) {
    float sums[kWidth / 8][4] = {};
    PEFT_KERNELS_UNROLL
    for (int step = 0; step < kSlice / kFragment; ++step) {
      uint32_t a[4];
      load_matrices<false>(a, tile + Wide::offset(warp() * 16 + lane() % 16, 2 * step + lane() / 16));
      PEFT_KERNELS_UNROLL
      for (int j = 0; j < kWidth / 16; ++j) {
        uint32_t b[4];
        load_ranks(b, lora_B, step, j);
        mma_m16n8k16<T>(sums[2 * j], a, b[0], b[1]);
        mma_m16n8k16<T>(sums[2 * j + 1], a, b[2], b[3]);
      }
    }
    PEFT_KERNELS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = row_0 + warp() * 16 + 8 * half + lane() / 4;
      if (row >= end) continue;
      float* to = args.shrunk + (slice * static_cast<int64_t>(args.rows) + row) * args.width;
      PEFT_KERNELS_UNROLL
      for (int j = 0; j < kWidth / 8; ++j) {
        PEFT_KERNELS_UNROLL
        for (int k = 0; k < 2; ++k) {
          const int rank = 8 * j + 2 * (lane() % 4) + k;
          if (rank < args.width) to[rank] = sums[j][2 * half + k];
        }
      }
    }
  }

  PEFT_KERNELS_DEVICE static void store(const Arguments& args, int place, int column_0, const Sums& sums) {
    float* to = args.sums + static_cast<int64_t>(place) * args.columns * args.width;
    const int64_t by_column = args.transposed ? 1 : args.width, by_rank = args.transposed ? args.columns : 1;
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < kWarpColumns / 16; ++i) {
      PEFT_KERNELS_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int column = column_0 + warp() * kWarpColumns + 16 * i + 8 * half + lane() / 4;
        if (column >= args.columns) continue;
        PEFT_KERNELS_UNROLL
        for (int j = 0; j < kWidth / 8; ++j) {
          PEFT_KERNELS_UNROLL
          for (int k = 0; k < 2; ++k) {
            const int rank = 8 * j + 2 * (lane() % 4) + k;
            if (rank < args.width) to[column * by_column + rank * by_rank] = sums[i][j][2 * half + k];
          }
        }
      }
    }
  }
};

}  // namespace peft_kernels::lora_outer
