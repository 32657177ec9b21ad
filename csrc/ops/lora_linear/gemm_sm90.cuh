// Device code of the GEMM for sm_90a: a persistent kernel, in which the stages of the next tile are loaded while a tile is
// stored. Bound by the tensor cores at large sizes: they read both operands from shared memory.
#pragma once

#include "ptx/grid_dependency.cuh"
#include "common/kernel_source.cuh"
#include "gemm/mainloop_sm90.cuh"
#include "gemm/bias_sm90.cuh"
#include "ops/lora_linear/gemm.h"
#include "gemm/store_sm90.cuh"

#include <climits>
#include <cstdint>
#include <type_traits>

namespace peft_kernels::lora_gemm {

// As Arguments, with operands in boxes as WarpSpecialisedMainloop has them; of a K of 0 no map is read. `out` in boxes of 64
// rows.
struct BoxPair {
  TensorMap left, right;
  int K;
};

struct BoxArguments {
  BoxPair low[kMostPairs], base[kMostPairs];
  int pairs;
  TensorMap out;
  const uint8_t* dropout_mask[kMostPairs];
  int masks;
  const void* bias;
  int rows, columns;
  float* partials;
  int parts, part;
};

template <typename T, typename Tile, bool kByFeature>
struct BoxGemm : private WarpSpecialisedMainloop<T, Tile, true, kByFeature> {
  using Product = WarpSpecialisedMainloop<T, Tile, true, kByFeature>;
  using Product::group, Product::is_first, Product::lane, Product::row_of_group;
  using Product::kBlockK, Product::kGroupRows, Product::kSums, Product::kThreads;
  static constexpr int kOut = Product::kStagesBytes, kBarriers = kOut + kOutBytes<Product>;
  static constexpr int kSharedBytes = kBarriers + Product::kBarrierBytes;
  static constexpr bool kSplits = std::is_same_v<Tile, BoxSquare>;  // the other is taken where it fills the GPU
  static constexpr int kWords = Tile::kColumns / 32;  // of a row of the mask
  static_assert(kSharedBytes <= 232448);

  PEFT_KERNELS_DEVICE static void run(const BoxArguments& args, char* shared) {
    let_next_grid_start();  // if it was launched beside this one: the pass over x
    const typename Product::Ring ring(shared, shared + kBarriers);
    int all_stages = 0;
    for (int j = 0; j < args.pairs; ++j) all_stages += tiles_of(args.base[j].K, kBlockK);
    const auto stages_of = [&](int part) {
      const int rest = all_stages - part * args.part;
      return rest < args.part ? rest : args.part;
    };
    const auto load = [&] {
      prefetch(args.base[0].left), prefetch(args.base[0].right);
      typename Product::PipelineState state;
      Product::each_tile(args.rows, args.columns, args.parts, [&](int row_0, int column_0, int part) {
        // `stages` of the pairs', from the `first` on.
        const auto load_some = [&](const BoxPair* pairs, int first, int stages) {
          for (int j = 0; j < args.pairs && stages > 0; ++j) {
            const int there = tiles_of(pairs[j].K, kBlockK);
            for (int stage = first; stage < there && stages > 0; ++stage, --stages) {
              Product::load(ring, state, pairs[j].left, pairs[j].right, row_0, column_0, stage * kBlockK);
            }
            first = first > there ? first - there : 0;
          }
        };
        load_some(args.base, part * args.part, stages_of(part));
        if (part == 0) load_some(args.low, 0, INT_MAX);
      });
    };
    const auto multiply = [&] {
      typename Product::PipelineState state;
      Product::each_tile(args.rows, args.columns, args.parts, [&](int row_0, int column_0, int part) {
        row_0 += group() * kGroupRows;
        const int row = row_0 + row_of_group();
        const bool masked = part == 0 && args.masks > 0;
        Bits bits;
        if (masked) load_bits(args, args.dropout_mask[0], row, column_0, bits);  // of which nothing is asked before the end
        float sums[kSums];
        typename Product::Flow flow = Product::multiply_stages(ring, state, stages_of(part), sums);
        if (part == 0 && !masked) {
          for (int j = 0; j < args.pairs; ++j) {
            for (int k = 0; k < args.low[j].K; k += kBlockK) {
              Product::multiply_part(ring, state, flow, args.low[j].K - k, sums);
            }
          }
        }
        const BiasPairs<T, kSums> bias(part == 0 ? args.bias : nullptr, args.columns, column_0 + 2 * (lane() % 4));
        Product::finish(flow, sums);
        bias.add_to(sums);
        if (masked) add_kept(args, ring, state, row, column_0, bits, sums);
        if (kSplits && args.parts > 1) {
          store_part(args, part, row, column_0, sums);
        } else {
          store_tile<T, Product>(args.out, shared + kOut, row_0, column_0, sums);
        }
      });
      if (is_first()) stores_wait<0>();
    };
    Product::specialise(ring, load, multiply);
  }

 private:
  // The tile's bits of a thread's two rows, in words of memory: the first row's begin `shift` bits behind a word, and so the
  // second's, eight rows below.
  struct Bits {
    uint32_t words[2][kWords + 1];
    int shift;

    PEFT_KERNELS_DEVICE uint32_t of(int half, int word) const {
      const uint64_t both = static_cast<uint64_t>(words[half][word + 1]) << 32 | words[half][word];
      return static_cast<uint32_t>(both >> shift);
    }
  };

  PEFT_KERNELS_DEVICE static void load_bits(const BoxArguments& args, const uint8_t* dropout_mask, int row, int column_0,
                                            Bits& bits) {
    const int pitch = args.columns / 8;
    const uint8_t* from = dropout_mask + static_cast<int64_t>(row) * pitch + column_0 / 8;
    const int before = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 4);
    bits.shift = 8 * before;
    PEFT_KERNELS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int bytes = row + 8 * half < args.rows ? before + pitch - column_0 / 8 : 0;  // of the rest of the row
      PEFT_KERNELS_UNROLL
      for (int word = 0; word <= kWords; ++word) {
        const bool there = 4 * word < bytes && (word < kWords || before > 0);
        bits.words[half][word] =
            there ? *reinterpret_cast<const uint32_t*>(from - before + static_cast<int64_t>(8 * half) * pitch + 4 * word) : 0;
      }
    }
  }

  // sums += the low-rank products, each where its mask has a bit; `bits` are the first mask's.
  PEFT_KERNELS_DEVICE static void add_kept(const BoxArguments& args, const typename Product::Ring& ring,
                                           typename Product::PipelineState& state, int row, int column_0, Bits& bits,
                                           float (&sums)[kSums]) {
    for (int j = 0; j < args.pairs; ++j) {
      for (int k = 0; k < args.low[j].K; k += kBlockK) {
        Product::multiply_by_columns(ring, state, args.low[j].K - k, [&](int part, const float (&product)[32]) {
          PEFT_KERNELS_UNROLL
          for (int at = 0; at < 32; ++at) {
            const int fragment = at / 4, bit = fragment % 4 * 8 + lane() % 4 * 2 + at % 2;
            if (bits.of(at / 2 % 2, 2 * part + fragment / 4) >> bit & 1) sums[32 * part + at] += product[at];
          }
        });
      }
      // All at once, and waited for once a pair: to hold two masks' bits at a time spills registers.
      if (args.masks > 1 && j + 1 < args.pairs) load_bits(args, args.dropout_mask[j + 1], row, column_0, bits);
    }
  }

  // As float32, from the registers.
  PEFT_KERNELS_DEVICE static void store_part(const BoxArguments& args, int part, int row, int column_0,
                                             const float (&sums)[kSums]) {
    struct alignas(8) Pair {
      float values[2];
    };
    PEFT_KERNELS_UNROLL
    for (int j = 0; j < Tile::kColumns / 8; ++j) {
      const int column = column_0 + 8 * j + 2 * (lane() % 4);
      PEFT_KERNELS_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (row + 8 * half >= args.rows || column >= args.columns) continue;
        const float* pair = sums + 4 * j + 2 * half;
        const int64_t at = (static_cast<int64_t>(part) * args.rows + row + 8 * half) * args.columns + column;
        *reinterpret_cast<Pair*>(args.partials + at) = {{pair[0], pair[1]}};
      }
    }
  }
};

}  // namespace peft_kernels::lora_gemm
