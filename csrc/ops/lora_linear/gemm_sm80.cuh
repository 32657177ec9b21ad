// Device code of the GEMM for sm_80 and later. One tile of `out` a block. Bound by the tensor cores at large sizes.
#pragma once

#include "gemm/byte_tile.cuh"
#include "ptx/grid_dependency.cuh"
#include "common/kernel_source.cuh"
#include "gemm/mainloop_sm80.cuh"
#include "ops/lora_linear/gemm.h"

#include <cstdint>
#include <type_traits>

namespace peft_kernels::lora_gemm {

// kByFeature: right and low_right are [columns, …], K by K in a row; otherwise […, columns].
template <typename T, typename Tile, bool kByFeature>
struct Gemm : private WarpProduct<T, Tile, true, kByFeature> {
  using Product = WarpProduct<T, Tile, true, kByFeature>;
  using Sums = typename Product::Sums;
  using Product::column_of, Product::row_of, Product::warp_column, Product::lane;
  using Product::kFragmentColumns, Product::kFragmentRows, Product::kSteps;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr bool kSplits = std::is_same_v<Tile, Small>;  // the others are taken where they fill the GPU
  static_assert(!kSplits || Tile::kBlockK == 64);
  static constexpr int kOutPitch = Tile::kColumns + kChunk;  // so that neighbouring rows lie in different banks
  static constexpr int kOutBytes = Tile::kRows * kOutPitch * 2;
  // Behind the stages, in whose place `out` goes: masks and bias, which come with the first stage.
  using Keep = ByteTile<Tile::kRows, Tile::kColumns / 8>;
  using Bias = ByteTile<1, Tile::kColumns * 2>;
  static constexpr int kKeep = Product::kStagesBytes > kOutBytes ? Product::kStagesBytes : kOutBytes;
  static constexpr int kBias = kKeep + kMostPairs * Keep::kBytes;
  static constexpr int kSharedBytes = kBias + Bias::kBytes;

  PEFT_KERNELS_DEVICE static void run(const Arguments& args, char* shared) {
    let_next_grid_start();  // if it was launched beside this one: the pass over x
    const int tiles = tiles_of(args.rows, Tile::kRows) * tiles_of(args.columns, Tile::kColumns);
    const int part = kSplits ? block_index() / tiles : 0;
    const TileCoordinate tile =
        swizzled_tile(block_index() - part * tiles, args.rows, args.columns, Tile::kRows, Tile::kColumns);
    const int row_0 = tile.row * Tile::kRows, column_0 = tile.column * Tile::kColumns;
    const int low_stages = part == 0 ? stages_of(args.low, args.pairs, Tile::kBlockK) : 0;
    const int first = kSplits ? part * args.part : 0;  // of the base's stages
    int stages = stages_of(args.base, args.pairs, Tile::kBlockK) - first;
    if (kSplits && stages > args.part) stages = args.part;
    Sums sums = {};

    for (int mask = 0; low_stages > 0 && mask < args.masks; ++mask) {
      Keep::template copy<kThreads>(shared + kKeep + mask * Keep::kBytes, keep_of(args, mask, row_0, column_0),
                                    mask_pitch(args), args.rows - row_0, mask_pitch(args) - column_0 / 8);
    }
    if (args.bias != nullptr) {
      Bias::template copy<kThreads>(shared + kBias, bias_of(args, column_0), 0, 1, 2 * (args.columns - column_0));
    }
    const auto fetch = [&](int stage, char* place) {  // operands are chosen by the stage and copied by the same code
      const bool low = stage < low_stages;
      int k_0 = low ? stage : first + stage - low_stages;
      const Pair* pairs = low ? args.low : args.base;
      const Pair& pair = pairs[pair_of(pairs, args.pairs, k_0)];
      const Operands operands{pair.left, pair.left_pitch, pair.right,  pair.right_pitch,
                              args.rows, args.columns,    pair.K};
      Product::fetch(place, operands, row_0, column_0, k_0);
    };
    const auto use = [&](int stage, const char* place) {
      if (stage >= low_stages) {
        PEFT_KERNELS_UNROLL
        for (int step = 0; step < kSteps; ++step) Product::multiply(place, step, sums);
      } else {  // few steps where the rank is small
        int k_0 = stage;
        const int pair = pair_of(args.low, args.pairs, k_0);
        const int left_over = tiles_of(args.low[pair].K - k_0, kFragment);
        const int steps = left_over < kSteps ? left_over : kSteps;
        if (args.masks > 0) {
          const int mask = mask_of(args.masks, pair);
          multiply_kept(place, steps, shared + kKeep + mask * Keep::kBytes, keep_of(args, mask, row_0, column_0),
                        mask_pitch(args), sums);
        } else {
          for (int step = 0; step < steps; ++step) Product::multiply(place, step, sums);
        }
      }
    };
    Product::each_stage(shared, low_stages + stages, fetch, use);
    if (kSplits && args.parts > 1) {
      store_part(args, part, shared, row_0, column_0, sums);
    } else {
      store(args, shared, row_0, column_0, sums);
    }
  }

 private:
  // Whose stage it is; `stage`, counted over all pairs, becomes the pair's first element of K.
  PEFT_KERNELS_DEVICE static int pair_of(const Pair* pairs, int count, int& stage) {
    int j = 0;
    for (; j < count - 1 && stage >= tiles_of(pairs[j].K, Tile::kBlockK); ++j) {
      stage -= tiles_of(pairs[j].K, Tile::kBlockK);
    }
    stage *= Tile::kBlockK;
    return j;
  }

  // Of a mask, the tile's first byte.
  PEFT_KERNELS_DEVICE static int mask_pitch(const Arguments& args) { return (args.columns + 7) / 8; }
  PEFT_KERNELS_DEVICE static const uint8_t* keep_of(const Arguments& args, int mask, int row_0, int column_0) {
    return args.dropout_mask[mask] + static_cast<int64_t>(row_0) * mask_pitch(args) + column_0 / 8;
  }

  // sums += a stage's product where there is a bit.
  PEFT_KERNELS_DEVICE static void multiply_kept(const char* place, int steps, const char* bits, const uint8_t* dropout_mask,
                                                int mask_pitch, Sums& sums) {
    Product::multiply_by_fragments(place, steps, [&](int i, int j, const float (&product)[4]) {
      PEFT_KERNELS_UNROLL
      for (int half = 0; half < 2; ++half) {
        const char* row = Keep::row(bits, dropout_mask, mask_pitch, row_of(i, half)) + warp_column() / 8;
        const int pair = static_cast<uint8_t>(row[j]) >> lane() % 4 * 2;
        if (pair & 1) sums[i][j][2 * half] += product[2 * half];
        if (pair & 2) sums[i][j][2 * half + 1] += product[2 * half + 1];
      }
    });
  }

  // The tile's first.
  PEFT_KERNELS_DEVICE static const T* bias_of(const Arguments& args, int column_0) {
    return static_cast<const T*>(args.bias) + column_0;
  }

  // Of a pair of the tile's columns, in float32; zeros beyond the last, and without a bias.
  PEFT_KERNELS_DEVICE static void load_bias(const Arguments& args, const char* shared, int column_0, int column,
                                            float (&pair)[2]) {
    const char* bias = args.bias == nullptr ? nullptr : Bias::row(shared + kBias, bias_of(args, column_0), 0, 0);
    PEFT_KERNELS_UNROLL
    for (int k = 0; k < 2; ++k) {
      pair[k] = bias == nullptr ? 0.0f : static_cast<float>(reinterpret_cast<const T*>(bias)[column + k]);
    }
  }

  // As float32, from the registers.
  PEFT_KERNELS_DEVICE static void store_part(const Arguments& args, int part, const char* shared, int row_0,
                                             int column_0, const Sums& sums) {
    PEFT_KERNELS_UNROLL
    for (int j = 0; j < kFragmentColumns; ++j) {
      const int column = column_0 + column_of(j);
      float bias[2] = {};
      if (part == 0) load_bias(args, shared, column_0, column_of(j), bias);
      PEFT_KERNELS_UNROLL
      for (int i = 0; i < kFragmentRows; ++i) {
        PEFT_KERNELS_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int row = row_0 + row_of(i, half);
          if (row >= args.rows) continue;
          float* to = args.partials + (static_cast<int64_t>(part) * args.rows + row) * args.columns + column;
          PEFT_KERNELS_UNROLL
          for (int k = 0; k < 2; ++k) {
            if (column + k < args.columns) to[k] = sums[i][j][2 * half + k] + bias[k];
          }
        }
      }
    }
  }

  // By way of shared memory, so that a warp writes whole lines.
  PEFT_KERNELS_DEVICE static void store(const Arguments& args, char* shared, int row_0, int column_0,
                                        const Sums& sums) {
    T* tile = reinterpret_cast<T*>(shared);
    PEFT_KERNELS_UNROLL
    for (int j = 0; j < kFragmentColumns; ++j) {
      const int column = column_of(j);
      float bias[2];
      load_bias(args, shared, column_0, column, bias);
      PEFT_KERNELS_UNROLL
      for (int i = 0; i < kFragmentRows; ++i) {
        PEFT_KERNELS_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int row = row_of(i, half);
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
