// Device code of the GEMM for sm_80 and later: cp.async in several stages, ldmatrix, mma. One tile of `out` a block.
//
// Bound by the tensor cores at large sizes. Of shared memory a stage holds kRows + kColumns rows of kDepth elements; a
// warp reads from it (kWarpRows + kWarpColumns)·kDepth elements a stage.
#pragma once

#include "common/copy_async.h"
#include "common/kernel_source.h"
#include "common/load_matrices.h"
#include "common/mma.h"
#include "common/shared_tile.h"
#include "lora_linear/gemm.h"
#include "lora_linear/tiles.h"

#include <cstdint>

namespace peft_kernels::lora_gemm {

// kByFeature: right and low_right are [columns, …], depth by depth in a row; otherwise […, columns].
template <typename T, typename Tile, bool kByFeature>
struct Gemm {
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kSteps = Tile::kDepth / kFragment;
  static constexpr int kFragmentRows = Tile::kWarpRows / 16;
  static constexpr int kFragmentColumns = Tile::kWarpColumns / 8;
  using Left = SharedTile<Tile::kRows, Tile::kDepth>;
  using Right = SharedTile<kByFeature ? Tile::kColumns : Tile::kDepth, kByFeature ? Tile::kDepth : Tile::kColumns>;
  static constexpr int kStageBytes = Left::kBytes + Right::kBytes;
  static constexpr int kKeepPitch = Tile::kColumns / 8;  // bytes of a row of the mask
  static constexpr int kOutPitch = Tile::kColumns + kChunk;  // so that neighbouring rows lie in different banks
  static constexpr int kOutBytes = Tile::kRows * kOutPitch * 2;
  static constexpr int kStagesBytes =
      Tile::kStages * kStageBytes > kOutBytes ? Tile::kStages * kStageBytes : kOutBytes;
  static constexpr int kSharedBytes = kStagesBytes + Tile::kRows * kKeepPitch;  // the mask lies behind the stages

  using Accumulators = float[kFragmentRows][kFragmentColumns][4];

  PEFT_KERNELS_DEVICE static void run(const Arguments& args, char* shared) {
    const Position tile = position(block_index(), args.rows, args.columns, Tile::kRows, Tile::kColumns);
    const int row_0 = tile.row * Tile::kRows, column_0 = tile.column * Tile::kColumns;
    const int low_stages = tiles_of(args.rank, Tile::kDepth);
    const int stages = low_stages + tiles_of(args.depth, Tile::kDepth);
    Accumulators sums = {};

    if (args.keep != nullptr) fetch_mask(args, shared + kStagesBytes, row_0, column_0);
    PEFT_KERNELS_UNROLL
    for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
      fetch(args, shared, stage, stages, low_stages, row_0, column_0);
    }
    for (int stage = 0; stage < stages; ++stage) {
      copy_async_wait<Tile::kStages - 2>();
      sync_block();  // this stage has arrived, and the one before it is read: its place is free
      fetch(args, shared, stage + Tile::kStages - 1, stages, low_stages, row_0, column_0);
      const char* place = shared + stage % Tile::kStages * kStageBytes;
      if (stage >= low_stages) {
        PEFT_KERNELS_UNROLL
        for (int step = 0; step < kSteps; ++step) multiply(place, step, sums);
      } else {  // few steps where the rank is small
        const int left_over = tiles_of(args.rank - stage * Tile::kDepth, kFragment);
        for (int step = 0; step < (left_over < kSteps ? left_over : kSteps); ++step) multiply(place, step, sums);
        if (stage == low_stages - 1 && args.keep != nullptr) mask(shared + kStagesBytes, sums);
      }
    }
    copy_async_wait<0>();
    sync_block();
    store(args, shared, row_0, column_0, sums);
  }

 private:
  PEFT_KERNELS_DEVICE static int warp_row() {
    return thread_index() / 32 / (Tile::kColumns / Tile::kWarpColumns) * Tile::kWarpRows;
  }
  PEFT_KERNELS_DEVICE static int warp_column() {
    return thread_index() / 32 % (Tile::kColumns / Tile::kWarpColumns) * Tile::kWarpColumns;
  }
  PEFT_KERNELS_DEVICE static int lane() { return thread_index() % 32; }

  // Starts the copies of a stage; past the last one an empty group, so that waiting counts alike. Operands are chosen by
  // the stage and copied by the same code.
  PEFT_KERNELS_DEVICE static void fetch(const Arguments& args, char* shared, int stage, int stages, int low_stages,
                                        int row_0, int column_0) {
    if (stage < stages) {
      char* place = shared + stage % Tile::kStages * kStageBytes;
      const bool low = stage < low_stages;
      const void* left = low ? args.low_left : args.left;
      const void* right = low ? args.low_right : args.right;
      const int64_t left_pitch = low ? args.low_left_pitch : args.left_pitch;
      const int64_t right_pitch = low ? args.low_right_pitch : args.right_pitch;
      const int depth = low ? args.rank : args.depth, depth_0 = (low ? stage : stage - low_stages) * Tile::kDepth;
      Left::template copy<kThreads>(place, left, left_pitch, row_0, args.rows, depth_0, depth);
      place += Left::kBytes;
      if constexpr (kByFeature) {
        Right::template copy<kThreads>(place, right, right_pitch, column_0, args.columns, depth_0, depth);
      } else {
        Right::template copy<kThreads>(place, right, right_pitch, depth_0, depth, column_0, args.columns);
      }
    }
    copy_async_commit();
  }

  // sums += 16 of a stage's depth, from element 16·step on.
  PEFT_KERNELS_DEVICE static void multiply(const char* place, int step, Accumulators& sums) {
    uint32_t a[kFragmentRows][4], b[kFragmentColumns / 2][4];
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < kFragmentRows; ++i) {
      load_matrices<false>(a[i], place + Left::offset(warp_row() + 16 * i + lane() % 16, 2 * step + lane() / 16));
    }
    PEFT_KERNELS_UNROLL
    for (int j = 0; j < kFragmentColumns / 2; ++j) {  // two fragments of 8 columns at a time
      const int column = warp_column() + 16 * j;
      if constexpr (kByFeature) {
        const int row = column + lane() % 8 + lane() / 16 * 8;
        load_matrices<false>(b[j], place + Left::kBytes + Right::offset(row, 2 * step + lane() / 8 % 2));
      } else {
        const int row = 16 * step + lane() % 16;
        load_matrices<true>(b[j], place + Left::kBytes + Right::offset(row, column / kChunk + lane() / 16));
      }
    }
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < kFragmentRows; ++i) {
      PEFT_KERNELS_UNROLL
      for (int j = 0; j < kFragmentColumns; ++j) {
        mma_m16n8k16<T>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  // The tile's bits, with the copies of the first stage where rows start on 8 bytes.
  PEFT_KERNELS_DEVICE static void fetch_mask(const Arguments& args, char* bits, int row_0, int column_0) {
    const int64_t pitch = (args.columns + 7) / 8;
    const auto* keep = args.keep + row_0 * pitch + column_0 / 8;
    const int height = args.rows - row_0, width = static_cast<int>(pitch - column_0 / 8);  // of the rest of the mask
    if ((reinterpret_cast<uintptr_t>(args.keep) | pitch) % 8 == 0) {
      for (int item = thread_index(); item < Tile::kRows * kKeepPitch / 8; item += kThreads) {
        const int row = item / (kKeepPitch / 8), byte = item % (kKeepPitch / 8) * 8;
        const bool inside = row < height && byte < width;
        copy_async<8>(bits + item * 8, inside ? keep + row * pitch + byte : args.keep, inside ? 8 : 0);
      }
    } else {
      for (int item = thread_index(); item < Tile::kRows * kKeepPitch; item += kThreads) {
        const int row = item / kKeepPitch, byte = item % kKeepPitch;
        bits[item] = row < height && byte < width ? static_cast<char>(keep[row * pitch + byte]) : 0;
      }
    }
  }

  // Zero where there is no bit. By words of shared memory: as bytes of global memory they took more registers than there
  // are, all loaded at once.
  PEFT_KERNELS_DEVICE static void mask(const char* bits, Accumulators& sums) {
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < kFragmentRows; ++i) {
      PEFT_KERNELS_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row() + 16 * i + 8 * half + lane() / 4;
        const auto* words = reinterpret_cast<const uint32_t*>(bits + row * kKeepPitch + warp_column() / 8);
        PEFT_KERNELS_UNROLL
        for (int j = 0; j < kFragmentColumns; ++j) {
          const uint32_t pair = words[j / 4] >> (j % 4 * 8 + lane() % 4 * 2);
          if (!(pair & 1)) sums[i][j][2 * half] = 0.0f;
          if (!(pair & 2)) sums[i][j][2 * half + 1] = 0.0f;
        }
      }
    }
  }

  // By way of shared memory, so that a warp writes whole lines.
  PEFT_KERNELS_DEVICE static void store(const Arguments& args, char* shared, int row_0, int column_0,
                                        const Accumulators& sums) {
    T* tile = reinterpret_cast<T*>(shared);
    PEFT_KERNELS_UNROLL
    for (int j = 0; j < kFragmentColumns; ++j) {
      const int column = warp_column() + 8 * j + 2 * (lane() % 4);
      float bias[2] = {};
      PEFT_KERNELS_UNROLL
      for (int k = 0; k < 2; ++k) {
        if (args.bias != nullptr && column_0 + column + k < args.columns) {
          bias[k] = static_cast<float>(static_cast<const T*>(args.bias)[column_0 + column + k]);
        }
      }
      PEFT_KERNELS_UNROLL
      for (int i = 0; i < kFragmentRows; ++i) {
        PEFT_KERNELS_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row() + 16 * i + 8 * half + lane() / 4;
          struct alignas(4) Pair {
            T values[2];
          };
          *reinterpret_cast<Pair*>(tile + row * kOutPitch + column) = {
              {T(sums[i][j][2 * half] + bias[0]), T(sums[i][j][2 * half + 1] + bias[1])}};
        }
      }
    }
    sync_block();
    constexpr int kChunks = Tile::kColumns / kChunk;
    struct alignas(16) Chunk {
      T values[kChunk];
    };
    for (int item = thread_index(); item < Tile::kRows * kChunks; item += kThreads) {
      const int row = item / kChunks, column = column_0 + item % kChunks * kChunk;
      if (row_0 + row >= args.rows || column >= args.columns) continue;
      const Chunk chunk = *reinterpret_cast<const Chunk*>(tile + row * kOutPitch + item % kChunks * kChunk);
      T* to = static_cast<T*>(args.out) + static_cast<int64_t>(row_0 + row) * args.columns + column;
      if (args.columns % kChunk == 0) {
        *reinterpret_cast<Chunk*>(to) = chunk;
      } else {
        PEFT_KERNELS_UNROLL
        for (int k = 0; k < kChunk; ++k) {
          if (column + k < args.columns) to[k] = chunk.values[k];
        }
      }
    }
  }
};

}  // namespace peft_kernels::lora_gemm
