// Device code of the gradient of entries for sm_90a: tiles of dW by a persistent kernel, in which the stages of the next tile
// are loaded while entries are gathered. Bound by the tensor cores.
#pragma once

#include "common/kernel_source.cuh"
#include "gemm/mainloop_sm90.cuh"
#include "ops/sparse_delta/gathered.h"

namespace peft_kernels::sparse_gathered {

// As Arguments, with operands in boxes as WarpSpecialisedMainloop has them.
struct BoxArguments {
  TensorMap dy, x;
  Arguments rest;
};

template <typename T, typename Tile>
struct BoxGathered : private WarpSpecialisedMainloop<T, Tile, false, false> {
  using Product = WarpSpecialisedMainloop<T, Tile, false, false>;
  using Product::kBlockK, Product::kGroupRows, Product::kThreads;
  static constexpr int kSumsBytes = kGroupRows * kChunkColumns * 4;  // a warpgroup's
  static constexpr int kSums = Product::kStagesBytes, kBarriers = kSums + Product::kGroups * kSumsBytes;
  static constexpr int kSharedBytes = kBarriers + Product::kBarrierBytes;
  static_assert(kSharedBytes <= 232448);
  // To gather, a thread has rows kRowsAtOnce apart.
  static constexpr int kRowsAtOnce = kWarpgroup / kLanes, kRowsOfThread = kGroupRows / kRowsAtOnce;
  static constexpr int kChunks = Tile::kColumns / kChunkColumns;
  using Rows = Begins<kChunks>[kRowsOfThread];

  PEFT_KERNELS_DEVICE static void run(const BoxArguments& boxes, char* shared) {
    const Arguments& args = boxes.rest;
    const typename Product::Ring ring(shared, shared + kBarriers);
    const auto stages_of = [&](int part) {
      const int tokens = args.tokens - part * args.part;
      return tiles_of(tokens < args.part ? tokens : args.part, kBlockK);
    };
    const auto load = [&] {
      prefetch(boxes.dy), prefetch(boxes.x);
      typename Product::PipelineState state;
      Product::each_tile(args.entries.rows, args.entries.width, args.parts, [&](int row_0, int column_0, int part) {
        const int stages = stages_of(part);
        for (int stage = 0; stage < stages; ++stage) {
          Product::load(ring, state, boxes.dy, boxes.x, row_0, column_0, part * args.part + stage * kBlockK);
        }
      });
    };
    const auto multiply = [&] {
      typename Product::PipelineState state;
      Product::each_tile(args.entries.rows, args.entries.width, args.parts, [&](int row_0, int column_0, int part) {
        float sums[Product::kSums];
        typename Product::Flow flow = Product::multiply_stages(ring, state, stages_of(part), sums);
        row_0 += Product::group() * kGroupRows + thread_index() % kWarpgroup / kLanes;
        Rows rows;
        PEFT_KERNELS_UNROLL
        for (int i = 0; i < kRowsOfThread; ++i) {  // while products are under way
          rows[i].load(args.entries, row_0 + i * kRowsAtOnce, column_0 / kChunkColumns);
        }
        Product::finish(flow, sums);
        gather_tile(args, reinterpret_cast<float*>(shared + kSums + Product::group() * kSumsBytes), row_0, column_0, part,
                    rows, sums);
      });
    };
    Product::specialise(ring, load, multiply);
  }

 private:
  // A chunk of columns at a time by way of shared memory, since registers have no index. What the rows hold of a chunk is
  // loaded while the one before is gathered. `row_0`: this thread's first.
  PEFT_KERNELS_DEVICE static void gather_tile(const Arguments& args, float* chunk_sums, int row_0, int column_0, int part,
                                              const Rows& rows, const float (&sums)[Product::kSums]) {
    const int thread = thread_index() % kWarpgroup, lane = thread % kLanes, chunk_0 = column_0 / kChunkColumns;
    const auto range = [&](int i, int chunk) {
      return rows[i].range(args.entries, row_0 + i * kRowsAtOnce, chunk_0, chunk);
    };
    int held[kRowsOfThread], next[kRowsOfThread] = {};
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < kRowsOfThread; ++i) held[i] = held_first(args.entries, range(i, 0), lane);
    PEFT_KERNELS_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      PEFT_KERNELS_UNROLL
      for (int i = 0; i < kRowsOfThread && chunk + 1 < kChunks; ++i) {
        next[i] = held_first(args.entries, range(i, chunk + 1), lane);
      }
      Product::sync_group();  // the chunk before has been gathered
      PEFT_KERNELS_UNROLL
      for (int j = 0; j < kChunkColumns / 8; ++j) {
        PEFT_KERNELS_UNROLL
        for (int half = 0; half < 2; ++half) {
          struct alignas(8) Pair {
            float values[2];
          };
          const float* pair = sums + 4 * (chunk * kChunkColumns / 8 + j) + 2 * half;
          const int place =
              place_of(Product::row_of_group() + 8 * half, 8 * j + 2 * (Product::lane() % 4), kChunkColumns);
          *reinterpret_cast<Pair*>(chunk_sums + place) = {{pair[0], pair[1]}};
        }
      }
      Product::sync_group();
      PEFT_KERNELS_UNROLL
      for (int i = 0; i < kRowsOfThread; ++i) {
        gather(args, range(i, chunk), chunk_0 + chunk, lane, held[i], chunk_sums, i * kRowsAtOnce + thread / kLanes, 0,
               kChunkColumns, part);
        held[i] = next[i];
      }
    }
  }
};

}  // namespace peft_kernels::sparse_gathered
