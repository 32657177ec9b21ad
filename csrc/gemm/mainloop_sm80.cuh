// A tile of a product of two matrices by a block, for sm_80 and later: cp.async in several stages, ldmatrix, mma, and the
// sums in registers. Of shared memory a stage holds Tile::kRows + Tile::kColumns times Tile::kBlockK elements.
#pragma once

#include "ptx/copy_async.cuh"
#include "common/kernel_source.cuh"
#include "ptx/load_matrices.cuh"
#include "ptx/mma.cuh"
#include "gemm/shared_tile.cuh"
#include "gemm/tiles.h"

#include <cstdint>

namespace peft_kernels {

// Two matrices of 16-bit elements whose rows start on 16 bytes. By feature they are [rows, K] and [columns, K], K
// by K in a row; by K [K, rows] and [K, columns]. Pitches in elements.
struct Operands {
  const void* left;
  int64_t left_pitch;
  const void* right;
  int64_t right_pitch;
  int rows, columns, K;
};

template <typename T, typename Tile, bool kLeftByFeature, bool kRightByFeature>
struct WarpProduct {
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kSteps = Tile::kBlockK / kFragment;  // of a stage
  static constexpr int kFragmentRows = Tile::kWarpRows / 16, kFragmentColumns = Tile::kWarpColumns / 8;
  using Left = SharedTile<kLeftByFeature ? Tile::kRows : Tile::kBlockK, kLeftByFeature ? Tile::kBlockK : Tile::kRows>;
  using Right =
      SharedTile<kRightByFeature ? Tile::kColumns : Tile::kBlockK, kRightByFeature ? Tile::kBlockK : Tile::kColumns>;
  static constexpr int kStageBytes = Left::kBytes + Right::kBytes;
  static constexpr int kStagesBytes = Tile::kStages * kStageBytes;

  // Of a lane, in the places that mma.cuh names.
  using Sums = float[kFragmentRows][kFragmentColumns][4];

  PEFT_KERNELS_DEVICE static int lane() { return thread_index() % 32; }
  PEFT_KERNELS_DEVICE static int warp_row() {
    return thread_index() / 32 / (Tile::kColumns / Tile::kWarpColumns) * Tile::kWarpRows;
  }
  PEFT_KERNELS_DEVICE static int warp_column() {
    return thread_index() / 32 % (Tile::kColumns / Tile::kWarpColumns) * Tile::kWarpColumns;
  }
  // In the tile, of sums[i][j][2·half] and its right neighbour.
  PEFT_KERNELS_DEVICE static int row_of(int i, int half) { return warp_row() + 16 * i + 8 * half + lane() / 4; }
  PEFT_KERNELS_DEVICE static int column_of(int j) { return warp_column() + 8 * j + 2 * (lane() % 4); }

  // Stage by stage: fetch(stage, place) starts the copies, use(stage, place) multiplies what has arrived. At the end all of
  // shared memory is free.
  template <typename Fetch, typename Use>
  PEFT_KERNELS_DEVICE static void each_stage(char* shared, int stages, const Fetch& fetch, const Use& use) {
    const auto begin = [&](int stage) {
      if (stage < stages) fetch(stage, shared + stage % Tile::kStages * kStageBytes);
      copy_async_commit();  // past the last stage an empty group, so that waiting counts alike
    };
    PEFT_KERNELS_UNROLL
    for (int stage = 0; stage < Tile::kStages - 1; ++stage) begin(stage);
    for (int stage = 0; stage < stages; ++stage) {
      copy_async_wait<Tile::kStages - 2>();
      sync_block();  // this stage has arrived, and the one before it is read: its place is free
      begin(stage + Tile::kStages - 1);
      use(stage, shared + stage % Tile::kStages * kStageBytes);
    }
    copy_async_wait<0>();
    sync_block();
  }

  // Starts the copies of a stage: the tile at (row_0, column_0), from k_0 on.
  PEFT_KERNELS_DEVICE static void fetch(char* place, const Operands& of, int row_0, int column_0, int k_0) {
    if constexpr (kLeftByFeature) {
      Left::template copy<kThreads>(place, of.left, of.left_pitch, row_0, of.rows, k_0, of.K);
    } else {
      Left::template copy<kThreads>(place, of.left, of.left_pitch, k_0, of.K, row_0, of.rows);
    }
    place += Left::kBytes;
    if constexpr (kRightByFeature) {
      Right::template copy<kThreads>(place, of.right, of.right_pitch, column_0, of.columns, k_0, of.K);
    } else {
      Right::template copy<kThreads>(place, of.right, of.right_pitch, k_0, of.K, column_0, of.columns);
    }
  }

  // sums += 16 of a stage's K, from element 16·step on.
  PEFT_KERNELS_DEVICE static void multiply(const char* place, int step, Sums& sums) {
    uint32_t a[kFragmentRows][4], b[kFragmentColumns / 2][4];
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < kFragmentRows; ++i) load_rows(a[i], place, step, i);
    PEFT_KERNELS_UNROLL
    for (int j = 0; j < kFragmentColumns / 2; ++j) load_columns(b[j], place, step, j);
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < kFragmentRows; ++i) {
      PEFT_KERNELS_UNROLL
      for (int j = 0; j < kFragmentColumns; ++j) {
        mma_m16n8k16<T>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  // The same of `steps` of a stage, fragment by fragment: take(i, j, sums of it). It keeps few registers, and loads fragments
  // again and again.
  template <typename Take>
  PEFT_KERNELS_DEVICE static void multiply_by_fragments(const char* place, int steps, const Take& take) {
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < kFragmentRows; ++i) {
      PEFT_KERNELS_UNROLL
      for (int j = 0; j < kFragmentColumns / 2; ++j) {
        float sums[2][4] = {};
        for (int step = 0; step < steps; ++step) {
          uint32_t a[4], b[4];
          load_rows(a, place, step, i);
          load_columns(b, place, step, j);
          mma_m16n8k16<T>(sums[0], a, b[0], b[1]);
          mma_m16n8k16<T>(sums[1], a, b[2], b[3]);
        }
        take(i, 2 * j, sums[0]);
        take(i, 2 * j + 1, sums[1]);
      }
    }
  }

 private:
  // The fragment of sums[i], from element 16·step of a stage's K on.
  PEFT_KERNELS_DEVICE static void load_rows(uint32_t (&a)[4], const char* place, int step, int i) {
    const int row = warp_row() + 16 * i;
    if constexpr (kLeftByFeature) {
      load_matrices<false>(a, place + Left::offset(row + lane() % 16, 2 * step + lane() / 16));
    } else {
      const int k = 16 * step + lane() % 8 + lane() / 16 * 8;
      load_matrices<true>(a, place + Left::offset(k, row / kChunk + lane() / 8 % 2));
    }
  }

  // Those of sums[..][2·j] and of its right neighbour.
  PEFT_KERNELS_DEVICE static void load_columns(uint32_t (&b)[4], const char* place, int step, int j) {
    const int column = warp_column() + 16 * j;
    if constexpr (kRightByFeature) {
      const int row = column + lane() % 8 + lane() / 16 * 8;
      load_matrices<false>(b, place + Left::kBytes + Right::offset(row, 2 * step + lane() / 8 % 2));
    } else {
      const int k = 16 * step + lane() % 16;
      load_matrices<true>(b, place + Left::kBytes + Right::offset(k, column / kChunk + lane() / 16));
    }
  }
};

}  // namespace peft_kernels
