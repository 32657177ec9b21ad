// Device code of the GEMM for sm_90a: a persistent kernel, whose first warpgroup loads boxes through a ring of stages, while
// each other one multiplies 64 rows of the tile by wgmma.
//
// Bound by the tensor cores at large sizes: they read both operands from shared memory, and the accumulators stay in
// registers. The stages of the next tile are loaded while a tile is stored. Blocks of a cluster own tiles one above another;
// each loads its part of the columns' operand for both, so that the L2 cache is read for them once.
#pragma once

#include "common/cluster.h"
#include "common/kernel_source.h"
#include "common/mbarrier.h"
#include "common/tensor_copy.h"
#include "common/warpgroup.h"
#include "common/wgmma.h"
#include "lora_linear/tiles.h"

#include <cstdint>

namespace peft_kernels::lora_gemm {

// As Arguments, with operands as boxes are loaded of them: 64 of depth by the tile's rows, or by a block's share of its
// columns; by depth, 64 columns by 64 of depth. Of a rank of 0 no map is read. `out` in boxes of 64 rows.
struct BoxArguments {
  TensorMap left, right, low_left, low_right, out;
  const uint8_t* keep;
  const void* bias;
  int rows, columns, depth, rank;  // depth at least 1
};

template <typename T, typename Tile, bool kByFeature>
struct BoxGemm {
  static constexpr int kDepth = 64, kGroupRows = 64;
  static constexpr int kGroups = Tile::kRows / kGroupRows;  // warpgroups that multiply
  static constexpr int kThreads = (1 + kGroups) * kWarpgroup;
  static constexpr int kShare = Tile::kColumns / Tile::kCluster;  // columns that a block loads for its cluster
  static constexpr int kLeftBytes = Tile::kRows * kBoxRowBytes, kRightBytes = Tile::kColumns * kBoxRowBytes;
  static constexpr int kStageBytes = kLeftBytes + kRightBytes;
  static constexpr int kOutBytes = kGroupRows * kBoxRowBytes;  // a box of out; each warpgroup has two
  static constexpr int kOut = Tile::kStages * kStageBytes, kBarriers = kOut + 2 * kGroups * kOutBytes;
  static constexpr int kSharedBytes = kBarriers + 2 * Tile::kStages * static_cast<int>(sizeof(Mbarrier));
  static constexpr int kSums = Tile::kColumns / 2;  // of a thread
  static constexpr int kWords = Tile::kColumns / 32;  // of a row of the mask
  static_assert(kShare % kBoxColumns == 0 && kSharedBytes <= 232448);

  PEFT_KERNELS_DEVICE static void run(const BoxArguments& args, char* shared) {
    auto* loaded = reinterpret_cast<Mbarrier*>(shared + kBarriers);
    Mbarrier* read = loaded + Tile::kStages;
    if (thread_index() == 0) {
      for (int slot = 0; slot < Tile::kStages; ++slot) {
        mbarrier_init(loaded + slot, 1);
        mbarrier_init(read + slot, Tile::kCluster * kGroups * 4);  // every warp that reads the stage, of every block
      }
      mbarrier_publish();
    }
    sync_cluster();
    if (thread_index() < kWarpgroup) {
      give_registers<40>();
      if (thread_index() == 0) load(args, shared, loaded, read);
    } else {
      take_registers<232>();
      multiply(args, shared, loaded, read);
    }
    sync_cluster();  // others may still load into this block, and arrive on its barriers
  }

  static int64_t clusters_of(int rows, int columns) {
    return static_cast<int64_t>(tiles_of(rows, Tile::kCluster * Tile::kRows)) * tiles_of(columns, Tile::kColumns);
  }

 private:
  // A place in the ring, and the parity of its present round.
  struct Slot {
    int index = 0, parity = 0;
    PEFT_KERNELS_DEVICE void advance() {
      if (++index == Tile::kStages) index = 0, parity ^= 1;
    }
  };

  // The tiles of a cluster one after another: of(row_0, column_0) of this block's.
  template <typename Of>
  PEFT_KERNELS_DEVICE static void each_tile(const BoxArguments& args, const Of& of) {
    constexpr int kRows = Tile::kCluster * Tile::kRows;
    const int tiles = tiles_of(args.rows, kRows) * tiles_of(args.columns, Tile::kColumns);
    for (int tile = block_index() / Tile::kCluster; tile < tiles; tile += block_count() / Tile::kCluster) {
      const Position at = position(tile, args.rows, args.columns, kRows, Tile::kColumns);
      of(at.row * kRows + cluster_rank() * Tile::kRows, at.column * Tile::kColumns);
    }
  }

  // --- One thread ---------------------------------------------------------------------------------------------

  PEFT_KERNELS_DEVICE static void load(const BoxArguments& args, char* shared, Mbarrier* loaded, Mbarrier* read) {
    prefetch(args.left), prefetch(args.right), prefetch(args.out);
    const int low_stages = tiles_of(args.rank, kDepth), stages = low_stages + tiles_of(args.depth, kDepth);
    Slot slot;
    each_tile(args, [&](int row_0, int column_0) {
      for (int stage = 0; stage < stages; ++stage, slot.advance()) {
        const bool low = stage < low_stages;
        const TensorMap& left = low ? args.low_left : args.left;
        const TensorMap& right = low ? args.low_right : args.right;
        const int depth_0 = (low ? stage : stage - low_stages) * kDepth;
        char* place = shared + slot.index * kStageBytes;
        mbarrier_wait(read + slot.index, slot.parity ^ 1);
        mbarrier_arrive_expecting(loaded + slot.index, kStageBytes);
        load_box<false>(place, left, row_0, depth_0, loaded + slot.index, 0);
        load_right(right, place + kLeftBytes, depth_0, column_0, loaded + slot.index);
      }
    });
  }

  // This block's share of the columns, for every block of the cluster.
  PEFT_KERNELS_DEVICE static void load_right(const TensorMap& right, char* place, int depth_0, int column_0,
                                             Mbarrier* loaded) {
    constexpr bool kMulticast = Tile::kCluster > 1;
    constexpr uint16_t kAll = (1 << Tile::kCluster) - 1;
    const int first = cluster_rank() * kShare;
    place += first * kBoxRowBytes;
    column_0 += first;
    if constexpr (kByFeature) {
      load_box<kMulticast>(place, right, column_0, depth_0, loaded, kAll);
    } else {
      PEFT_KERNELS_UNROLL
      for (int column = 0; column < kShare; column += kBoxColumns) {
        load_box<kMulticast>(place + column * kBoxRowBytes, right, depth_0, column_0 + column, loaded, kAll);
      }
    }
  }

  // --- A warpgroup --------------------------------------------------------------------------------------------

  PEFT_KERNELS_DEVICE static int group() { return thread_index() / kWarpgroup - 1; }
  PEFT_KERNELS_DEVICE static int lane() { return thread_index() % 32; }
  // Of this thread's accumulators, in the tile; the others are eight rows below.
  PEFT_KERNELS_DEVICE static int row_of_group() { return thread_index() % kWarpgroup / 32 * 16 + lane() / 4; }

  PEFT_KERNELS_DEVICE static void multiply(const BoxArguments& args, char* shared, Mbarrier* loaded, Mbarrier* read) {
    const int low_stages = tiles_of(args.rank, kDepth), stages = tiles_of(args.depth, kDepth);
    Slot slot;
    each_tile(args, [&](int row_0, int column_0) {
      row_0 += group() * kGroupRows;
      float sums[kSums];
      uint32_t bits[2][kWords];
      if (args.keep != nullptr) load_mask(args, row_0 + row_of_group(), column_0, bits);

      for (int stage = 0; stage < low_stages; ++stage, slot.advance()) {
        mbarrier_wait(loaded + slot.index, slot.parity);
        const int left_over = tiles_of(args.rank - stage * kDepth, 16);
        int step = 0;
        do {  // few where the rank is small
          wgmma_fence();
          multiply(shared + slot.index * kStageBytes, step, sums, stage > 0 || step > 0);
          wgmma_commit();
          wgmma_wait<0>();
        } while (++step < 4 && step < left_over);
        release(read + slot.index);
      }
      if (args.keep != nullptr) mask(bits, sums);

      // One stage's products are under way while the next one's begin; its place is free when they are done.
      mbarrier_wait(loaded + slot.index, slot.parity);
      multiply_stage(shared + slot.index * kStageBytes, sums, low_stages > 0);
      Mbarrier* previous = read + slot.index;
      slot.advance();
      for (int stage = 1; stage < stages; ++stage, slot.advance()) {
        mbarrier_wait(loaded + slot.index, slot.parity);
        multiply_stage(shared + slot.index * kStageBytes, sums, true);
        wgmma_wait<1>();
        release(previous);
        previous = read + slot.index;
      }
      wgmma_wait<0>();
      release(previous);
      store(args, shared + kOut + 2 * group() * kOutBytes, row_0, column_0, sums);
    });
    if (thread_index() % kWarpgroup == 0) stores_wait<0>();
  }

  // Starts the products of a stage.
  PEFT_KERNELS_DEVICE static void multiply_stage(const char* place, float (&sums)[kSums], bool onto) {
    wgmma_fence();
    PEFT_KERNELS_UNROLL
    for (int step = 0; step < 4; ++step) multiply(place, step, sums, onto || step > 0);
    wgmma_commit();
  }

  // sums += 16 of a stage's depth, from element 16·step on.
  PEFT_KERNELS_DEVICE static void multiply(const char* place, int step, float (&sums)[kSums], bool onto) {
    const uint64_t left = operand_at<true>(place + group() * kGroupRows * kBoxRowBytes, 0);
    const uint64_t right = operand_at<kByFeature>(place + kLeftBytes, kDepth * kBoxRowBytes);
    wgmma<T, true, kByFeature>(sums, left + step * kOperandStep<true>, right + step * kOperandStep<kByFeature>, onto);
  }

  // This warp has read a stage that every block of the cluster loads into.
  PEFT_KERNELS_DEVICE static void release(Mbarrier* read) {
    if (lane() < Tile::kCluster) mbarrier_arrive_at(read, lane());
  }

  // The tile's bits of this thread's two rows, before the products that they wait for.
  PEFT_KERNELS_DEVICE static void load_mask(const BoxArguments& args, int row, int column_0, uint32_t (&bits)[2][kWords]) {
    const int pitch = args.columns / 8;
    const bool words = (reinterpret_cast<uintptr_t>(args.keep) | pitch) % 4 == 0;
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint8_t* from = args.keep + static_cast<int64_t>(row + 8 * i) * pitch + column_0 / 8;
      const int bytes = row + 8 * i < args.rows ? pitch - column_0 / 8 : 0;  // of the rest of the row
      PEFT_KERNELS_UNROLL
      for (int word = 0; word < kWords; ++word) {
        bits[i][word] = 0;
        if (words) {
          if (4 * word < bytes) bits[i][word] = *reinterpret_cast<const uint32_t*>(from + 4 * word);
        } else {
          PEFT_KERNELS_UNROLL
          for (int byte = 0; byte < 4; ++byte) {
            if (4 * word + byte < bytes) bits[i][word] |= static_cast<uint32_t>(from[4 * word + byte]) << 8 * byte;
          }
        }
      }
    }
  }

  // Zero where there is no bit.
  PEFT_KERNELS_DEVICE static void mask(const uint32_t (&bits)[2][kWords], float (&sums)[kSums]) {
    PEFT_KERNELS_UNROLL
    for (int at = 0; at < kSums; ++at) {
      const int fragment = at / 4, bit = fragment % 4 * 8 + lane() % 4 * 2 + at % 2;
      if (!(bits[at / 2 % 2][fragment / 4] >> bit & 1)) sums[at] = 0.0f;
    }
  }

  // By way of shared memory, 64 columns at a time. The engine stores them while the next ones are rounded, and while the
  // next tile is multiplied.
  PEFT_KERNELS_DEVICE static void store(const BoxArguments& args, char* boxes, int row_0, int column_0,
                                        const float (&sums)[kSums]) {
    const bool first = thread_index() % kWarpgroup == 0;
    PEFT_KERNELS_UNROLL
    for (int part = 0; part < Tile::kColumns / kBoxColumns; ++part) {
      char* box = boxes + part % 2 * kOutBytes;
      if (first) stores_wait<1>();
      sync_named(1 + group(), kWarpgroup);  // the box has been read
      PEFT_KERNELS_UNROLL
      for (int j = 0; j < kBoxColumns / 8; ++j) {
        const int fragment = part * kBoxColumns / 8 + j, column = column_0 + 8 * fragment + 2 * (lane() % 4);
        float bias[2] = {};
        if (args.bias != nullptr && column < args.columns) {  // of an even number of columns
          PEFT_KERNELS_UNROLL
          for (int k = 0; k < 2; ++k) bias[k] = static_cast<float>(static_cast<const T*>(args.bias)[column + k]);
        }
        PEFT_KERNELS_UNROLL
        for (int half = 0; half < 2; ++half) {
          struct alignas(4) Pair {
            T values[2];
          };
          char* to = box + box_offset(row_of_group() + 8 * half, j) + 4 * (lane() % 4);
          const float* pair = sums + 4 * fragment + 2 * half;
          *reinterpret_cast<Pair*>(to) = {{T(pair[0] + bias[0]), T(pair[1] + bias[1])}};
        }
      }
      publish_to_copies();
      sync_named(1 + group(), kWarpgroup);
      if (first) store_box(args.out, row_0, column_0 + part * kBoxColumns, box);
    }
  }
};

}  // namespace peft_kernels::lora_gemm
