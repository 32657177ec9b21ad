// Device code of the gradient of entries for sm_90a: tiles of dW by a persistent kernel, in which the stages of the next tile
// are loaded while entries are gathered. Bound by the tensor cores.
#pragma once

#include "common/kernel_source.h"
#include "common/product_sm90.h"
#include "sparse_delta/gathered.h"

namespace peft_kernels::sparse_gathered {

// As Arguments, with operands in boxes as BoxProduct has them.
struct BoxArguments {
  TensorMap dy, x;
  Arguments rest;
};

template <typename T, typename Tile>
struct BoxGathered : private BoxProduct<T, Tile, false, false> {
  using Product = BoxProduct<T, Tile, false, false>;
  using Product::kDepth, Product::kGroupRows, Product::kThreads;
  static constexpr int kSumsBytes = kGroupRows * kChunkColumns * 4;  // a warpgroup's
  static constexpr int kSums = Product::kStagesBytes, kBarriers = kSums + Product::kGroups * kSumsBytes;
  static constexpr int kSharedBytes = kBarriers + Product::kBarrierBytes;
  static_assert(kSharedBytes <= 232448);

  PEFT_KERNELS_DEVICE static void run(const BoxArguments& boxes, char* shared) {
    const Arguments& args = boxes.rest;
    const typename Product::Ring ring(shared, shared + kBarriers);
    const auto stages_of = [&](int part) {
      const int tokens = args.tokens - part * args.part;
      return tiles_of(tokens < args.part ? tokens : args.part, kDepth);
    };
    const auto load = [&] {
      prefetch(boxes.dy), prefetch(boxes.x);
      typename Product::Slot slot;
      Product::each_tile(args.entries.rows, args.entries.width, args.parts, [&](int row_0, int column_0, int part) {
        const int stages = stages_of(part);
        for (int stage = 0; stage < stages; ++stage) {
          Product::load(ring, slot, boxes.dy, boxes.x, row_0, column_0, part * args.part + stage * kDepth);
        }
      });
    };
    const auto multiply = [&] {
      typename Product::Slot slot;
      Product::each_tile(args.entries.rows, args.entries.width, args.parts, [&](int row_0, int column_0, int part) {
        float sums[Product::kSums];
        Product::multiply_stages(ring, slot, stages_of(part), sums, false);
        gather_tile(args, reinterpret_cast<float*>(shared + kSums + Product::group() * kSumsBytes),
                    row_0 + Product::group() * kGroupRows, column_0, part, sums);
      });
    };
    Product::specialise(ring, load, multiply);
  }

 private:
  // A chunk of columns at a time by way of shared memory, since registers have no index.
  PEFT_KERNELS_DEVICE static void gather_tile(const Arguments& args, float* chunk_sums, int row_0, int column_0, int part,
                                              const float (&sums)[Product::kSums]) {
    constexpr int kRowsAtOnce = kWarpgroup / kLanes;
    const int thread = thread_index() % kWarpgroup;
    PEFT_KERNELS_UNROLL
    for (int chunk = 0; chunk < Tile::kColumns / kChunkColumns; ++chunk) {
      const int first = column_0 + chunk * kChunkColumns;
      Range ranges[kGroupRows / kRowsAtOnce] = {};  // loaded together, and ahead of the barriers
      PEFT_KERNELS_UNROLL
      for (int i = 0; i < kGroupRows / kRowsAtOnce; ++i) {
        const int row = row_0 + i * kRowsAtOnce + thread / kLanes;
        if (row < args.entries.rows && first < args.entries.width) {
          ranges[i] = range_of(args.entries, row, first / kChunkColumns);
        }
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
      for (int i = 0; i < kGroupRows / kRowsAtOnce; ++i) {
        gather(args, ranges[i], first / kChunkColumns, thread % kLanes, chunk_sums, i * kRowsAtOnce + thread / kLanes, 0,
               kChunkColumns, part);
      }
    }
  }
};

}  // namespace peft_kernels::sparse_gathered
