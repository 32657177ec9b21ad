// A tile of a product of two matrices by a block, for sm_90a: the first warpgroup loads boxes through a ring of stages, 64 of
// K each, while each other one multiplies 64 rows of the tile by wgmma, the sums in registers. Blocks of a cluster own
// neighbouring tiles; each loads its share of the operand that they have in common for all, so that the L2 cache is read for it
// once: the columns' of tiles one above another, the rows' of tiles side by side.
#pragma once

#include "ptx/cluster.cuh"
#include "common/kernel_source.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tensor_copy.cuh"
#include "gemm/tiles.h"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"

#include <cstdint>
#include <type_traits>

namespace peft_kernels {

// By feature an operand is [rows, K] or [columns, K], in boxes of 64 of K by kLeftBox or kRightBox features; by
// K it is [K, rows] or [K, columns], in boxes of 64 features by 64 of K.
template <typename T, typename Tile, bool kLeftByFeature, bool kRightByFeature>
struct WarpSpecialisedMainloop {
  static constexpr int kBlockK = 64, kGroupRows = 64, kCluster = Tile::kCluster;
  static constexpr int kGroups = Tile::kRows / kGroupRows;  // warpgroups that multiply
  static constexpr int kThreads = (1 + kGroups) * kWarpgroup;
  // That a block loads for its cluster.
  static constexpr int kLeftShare = Tile::kRows / Tile::kAcross, kRightShare = Tile::kColumns / Tile::kDown;
  static constexpr int kLeftBox = kLeftByFeature ? kLeftShare : kBlockK;
  static constexpr int kRightBox = kRightByFeature ? kRightShare : kBlockK;
  static constexpr int kLeftBytes = Tile::kRows * kBoxRowBytes, kRightBytes = Tile::kColumns * kBoxRowBytes;
  static constexpr int kStageBytes = kLeftBytes + kRightBytes;
  static constexpr int kStagesBytes = Tile::kStages * kStageBytes;
  static constexpr int kBarrierBytes = 2 * Tile::kStages * static_cast<int>(sizeof(Mbarrier));
  static constexpr int kSums = Tile::kColumns / 2;  // of a thread, in the places that wgmma.cuh names
  static_assert(kLeftShare % kBoxColumns == 0 && kRightShare % kBoxColumns == 0);

  // kStagesBytes of stages; of each whether it has been loaded, and whether it has been read.
  struct Ring {
    char* stages;
    Mbarrier *full, *empty;
    PEFT_KERNELS_DEVICE Ring(char* stages, char* barriers)
        : stages(stages), full(reinterpret_cast<Mbarrier*>(barriers)), empty(full + Tile::kStages) {}
  };

  // A place in the ring, and the parity of its present round.
  struct PipelineState {
    int index = 0, parity = 0;
    PEFT_KERNELS_DEVICE void advance() {
      if (++index == Tile::kStages) index = 0, parity ^= 1;
    }
  };

  static int64_t clusters_of(int rows, int columns) { return peft_kernels::clusters_of<Tile>(rows, columns); }

  // Both sides of the block: load() by one thread, multiply() by the other warpgroups.
  template <typename Load, typename Multiply>
  PEFT_KERNELS_DEVICE static void specialise(const Ring& ring, const Load& load, const Multiply& multiply) {
    if (thread_index() == 0) {
      for (int stage = 0; stage < Tile::kStages; ++stage) {
        mbarrier_init(ring.full + stage, 1);
        mbarrier_init(ring.empty + stage, kCluster * kGroups * 4);  // every warp that reads it, of every block
      }
      mbarrier_publish();
    }
    sync_cluster();
    if (thread_index() < kWarpgroup) {
      dealloc_registers<40>();
      if (thread_index() == 0) load();
    } else {
      alloc_registers<232>();
      multiply();
    }
    sync_cluster();  // others may still load into this block, and arrive on its barriers
  }

  // A cluster's share of all tiles, `parts` times each, one after another: of(row_0, column_0, part), of this block's.
  template <typename Of>
  PEFT_KERNELS_DEVICE static void each_tile(int rows, int columns, int parts, const Of& of) {
    constexpr int kRows = Tile::kDown * Tile::kRows, kColumns = Tile::kAcross * Tile::kColumns;
    const int tiles = tiles_of(rows, kRows) * tiles_of(columns, kColumns);
    for (int work = block_index() / kCluster; work < tiles * parts; work += block_count() / kCluster) {
      const TileCoordinate at = swizzled_tile(work % tiles, rows, columns, kRows, kColumns);
      of(at.row * kRows + cluster_rank() % Tile::kDown * Tile::kRows,
         at.column * kColumns + cluster_rank() % Tile::kAcross * Tile::kColumns, work / tiles);
    }
  }

  // --- One thread ---------------------------------------------------------------------------------------------

  // A place in the ring that takes loads.
  struct Stage {
    char* place;
    Mbarrier* full;
    int index;
  };

  // The next one, when it has been read: `bytes` will be loaded into it.
  PEFT_KERNELS_DEVICE static Stage open(const Ring& ring, PipelineState& state, int bytes) {
    const Stage stage{ring.stages + state.index * kStageBytes, ring.full + state.index, state.index};
    mbarrier_wait(ring.empty + state.index, state.parity ^ 1);
    mbarrier_arrive_expecting(stage.full, bytes);
    state.advance();
    return stage;
  }

  // The tile's rows, from k_0 on: kLeftBytes.
  PEFT_KERNELS_DEVICE static void load_left(const Stage& stage, const TensorMap& left, int row_0, int k_0) {
    load_share<kLeftByFeature, Tile::kAcross, kLeftShare>(stage.place, left, row_0, k_0, stage.full);
  }

  // The tile's columns: kRightBytes.
  PEFT_KERNELS_DEVICE static void load_right(const Stage& stage, const TensorMap& right, int column_0, int k_0) {
    load_share<kRightByFeature, Tile::kDown, kRightShare>(stage.place + kLeftBytes, right, column_0, k_0, stage.full);
  }

  // A stage of both.
  PEFT_KERNELS_DEVICE static void load(const Ring& ring, PipelineState& state, const TensorMap& left, const TensorMap& right,
                                       int row_0, int column_0, int k_0) {
    const Stage stage = open(ring, state, kStageBytes);
    load_left(stage, left, row_0, k_0);
    load_right(stage, right, column_0, k_0);
  }

  // --- A warpgroup --------------------------------------------------------------------------------------------

  PEFT_KERNELS_DEVICE static int group() { return uniform(thread_index() / kWarpgroup) - 1; }
  PEFT_KERNELS_DEVICE static int lane() { return thread_index() % 32; }
  PEFT_KERNELS_DEVICE static bool is_first() { return thread_index() % kWarpgroup == 0; }
  PEFT_KERNELS_DEVICE static void sync_group() { sync_named(1 + group(), kWarpgroup); }
  // In the group's 64 rows, of this thread's sums; its others are eight rows below.
  PEFT_KERNELS_DEVICE static int row_of_group() { return thread_index() % kWarpgroup / 32 * 16 + lane() / 4; }

  // Stages whose products are under way: a new one's begin before the last one's are done, and its place is free then.
  struct Flow {
    Mbarrier* newest = nullptr;  // of which it has not been said that it was read
  };

  // The next stages, at least 1, of new sums.
  PEFT_KERNELS_DEVICE static Flow multiply_stages(const Ring& ring, PipelineState& state, int stages, float (&sums)[kSums]) {
    return multiply_stages(ring, state, stages, [](int, int, uint64_t, bool) {}, sums);
  }

  // The same beside another product of the rows: also(state, step, the operand of 16 of K, onto) at every step, whose sums
  // are `others`.
  template <typename Also, int... kOthers>
  PEFT_KERNELS_DEVICE static Flow multiply_stages(const Ring& ring, PipelineState& state, int stages, const Also& also,
                                                  float (&sums)[kSums], float (&... others)[kOthers]) {
    const auto multiply_stage = [&](const char* place, bool onto) {
      wgmma_fence(sums, others...);
      PEFT_KERNELS_UNROLL
      for (int step = 0; step < kBlockK / 16; ++step) {
        multiply(place, step, sums, onto || step > 0);
        also(state.index, step, left_operand(place) + step * kOperandStep<kLeftByFeature>, onto || step > 0);
      }
      wgmma_commit();
    };
    Flow flow;
    first_stage(ring, state, flow, [&](const char* place) { multiply_stage(place, false); });
    for (int stage = 1; stage < stages; ++stage) {
      next_stage(ring, state, flow, sums, [&](const char* place) { multiply_stage(place, true); });
    }
    return flow;
  }

  // sums += the first `K` of the next stage, as few steps of 16 as it takes.
  PEFT_KERNELS_DEVICE static void multiply_part(const Ring& ring, PipelineState& state, Flow& flow, int K,
                                                float (&sums)[kSums]) {
    next_stage(ring, state, flow, sums, [&](const char* place) {
      in_steps(K, [&](auto steps) {
        wgmma_fence(sums);
        PEFT_KERNELS_UNROLL
        for (int step = 0; step < steps.value; ++step) multiply(place, step, sums, true);
        wgmma_commit();
      });
    });
  }

  // sums += the product of rows in registers with the columns of the next stage; 16 of K a step.
  template <int kSteps>
  PEFT_KERNELS_DEVICE static void multiply_registers(const Ring& ring, PipelineState& state, Flow& flow,
                                                     const uint32_t (&rows)[kSteps][4], float (&sums)[kSums]) {
    next_stage(ring, state, flow, sums, [&](const char* place) {
      const uint64_t columns = right_operand(place);
      wgmma_fence(sums);
      PEFT_KERNELS_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        wgmma<T, kRightByFeature>(sums, rows[step], columns + step * kOperandStep<kRightByFeature>, true);
      }
      wgmma_commit();
    });
  }

  // All of it is done, and there are its sums.
  template <int... kOthers>
  PEFT_KERNELS_DEVICE static void finish(Flow& flow, float (&sums)[kSums], float (&... others)[kOthers]) {
    wgmma_wait<0>(sums, others...);
    release(flow.newest);
    flow.newest = nullptr;
  }

  // The product of the first `K` of the next stage, 64 columns at a time: take(part, sums of these columns).
  template <typename Take>
  PEFT_KERNELS_DEVICE static void multiply_by_columns(const Ring& ring, PipelineState& state, int K, const Take& take) {
    mbarrier_wait(ring.full + state.index, state.parity);
    const char* place = ring.stages + state.index * kStageBytes;
    PEFT_KERNELS_UNROLL
    for (int part = 0; part < Tile::kColumns / kBoxColumns; ++part) {
      float sums[kBoxColumns / 2];
      in_steps(K, [&](auto steps) {
        wgmma_fence(sums);
        PEFT_KERNELS_UNROLL
        for (int step = 0; step < steps.value; ++step) {
          wgmma<T, kLeftByFeature, kRightByFeature>(
              sums, left_operand(place) + step * kOperandStep<kLeftByFeature>,
              right_operand(place + part * kBoxBytes) + step * kOperandStep<kRightByFeature>, step > 0);
        }
        wgmma_commit();
      });
      wgmma_wait<0>(sums);
      take(part, sums);
    }
    release(ring.empty + state.index);
    state.advance();
  }

 private:
  static constexpr int kBoxBytes = kBlockK * kBoxRowBytes;  // 64 features, either way

  // This block's share of an operand's features, to each of the `kBlocks` of the cluster that have them in common.
  template <bool kByFeature, int kBlocks, int kShare>
  PEFT_KERNELS_DEVICE static void load_share(char* place, const TensorMap& operand, int feature_0, int k_0,
                                             Mbarrier* full) {
    constexpr bool kMulticast = kBlocks > 1;
    constexpr uint16_t kAll = (1 << kBlocks) - 1;
    const int share = kMulticast ? cluster_rank() * kShare : 0;
    place += share * kBoxRowBytes, feature_0 += share;
    if constexpr (kByFeature) {
      load_box<kMulticast>(place, operand, feature_0, k_0, full, kAll);
    } else {
      PEFT_KERNELS_UNROLL
      for (int feature = 0; feature < kShare; feature += kBoxColumns) {
        load_box<kMulticast>(place + feature * kBoxRowBytes, operand, k_0, feature_0 + feature, full, kAll);
      }
    }
  }

  PEFT_KERNELS_DEVICE static uint64_t left_operand(const char* place) {
    return operand_at<kLeftByFeature>(place + group() * kBoxBytes, kBoxBytes);
  }
  PEFT_KERNELS_DEVICE static uint64_t right_operand(const char* place) {
    return operand_at<kRightByFeature>(place + kLeftBytes, kBoxBytes);
  }

  // of(a constant), the steps of 16 that the first `K` of a stage takes: a group whose products are not in a loop needs no
  // further fences.
  template <typename Of>
  PEFT_KERNELS_DEVICE static void in_steps(int K, const Of& of) {
    if (K <= 16) return of(std::integral_constant<int, 1>());
    if (K <= 32) return of(std::integral_constant<int, 2>());
    if (K <= 48) return of(std::integral_constant<int, 3>());
    of(std::integral_constant<int, kBlockK / 16>());
  }

  // multiply(place of the next stage) is a group of products.
  template <typename Multiply>
  PEFT_KERNELS_DEVICE static void first_stage(const Ring& ring, PipelineState& state, Flow& flow, const Multiply& multiply) {
    mbarrier_wait(ring.full + state.index, state.parity);
    multiply(ring.stages + state.index * kStageBytes);
    flow.newest = ring.empty + state.index;
    state.advance();
  }

  template <typename Multiply>
  PEFT_KERNELS_DEVICE static void next_stage(const Ring& ring, PipelineState& state, Flow& flow, float (&sums)[kSums],
                                             const Multiply& multiply) {
    Mbarrier* last = flow.newest;
    first_stage(ring, state, flow, multiply);
    wgmma_wait<1>(sums);
    if (last != nullptr) release(last);
  }

  // sums += 16 of a stage's K, from element 16·step on.
  PEFT_KERNELS_DEVICE static void multiply(const char* place, int step, float (&sums)[kSums], bool onto) {
    wgmma<T, kLeftByFeature, kRightByFeature>(sums, left_operand(place) + step * kOperandStep<kLeftByFeature>,
                                              right_operand(place) + step * kOperandStep<kRightByFeature>, onto);
  }

  // This warp has read a stage that every block of the cluster loads into.
  PEFT_KERNELS_DEVICE static void release(Mbarrier* empty) {
    if (lane() < kCluster) mbarrier_arrive_at(empty, lane());
  }
};

}  // namespace peft_kernels
