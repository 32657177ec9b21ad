// Device code of the forward as one kernel (forward.h), for sm_90a: as the GEMM of gemm_sm90.cuh, but that each cluster takes
// tiles along its rows. At the first tile of new rows it also multiplies them by A, rounds S, and keeps it in registers for
// all tiles of these rows: clusters share nothing, and none waits for another.
#pragma once

#include "common/kernel_source.cuh"
#include "gemm/mainloop_sm90.cuh"
#include "gemm/bias_sm90.cuh"
#include "gemm/store_sm90.cuh"

#include <cstdint>
#include <cstring>

namespace peft_kernels::lora_forward {

// As Arguments, with operands in boxes: of x kLeftBox rows, of W and B kRightBox, of A kRanks, of y kGroupRows.
struct BoxArguments {
  TensorMap x, weight, lora_A, lora_B, y;
  const void* bias;
  const float* row_scale;
  float scale;
  void* s;
  int rows, columns, K, rank;
  int per_cluster;  // tiles
};

template <typename T, int kRanks>
struct BoxForward : private WarpSpecialisedMainloop<T, BoxWide, true, true> {
  using Product = WarpSpecialisedMainloop<T, BoxWide, true, true>;
  using Product::group, Product::is_first, Product::lane, Product::row_of_group;
  using Product::kCluster, Product::kBlockK, Product::kGroups, Product::kGroupRows, Product::kSums, Product::kThreads;
  static constexpr int kRankBytes = kRanks * kBoxRowBytes;                   // of a stage's box of A
  static constexpr int kRankStride = kOutBytes<Product> / BoxWide::kStages;  // they lie where tiles of y go later
  static constexpr int kOut = Product::kStagesBytes, kBarriers = kOut + kOutBytes<Product>;
  static constexpr int kStored = kBarriers + Product::kBarrierBytes;
  static constexpr int kSharedBytes = kStored + static_cast<int>(sizeof(Mbarrier));
  static constexpr int kSteps = kRanks / 16;
  static_assert(kRankBytes <= kRankStride && kRankStride % 1024 == 0 && kSharedBytes <= 232448);

  PEFT_KERNELS_DEVICE static void run(const BoxArguments& args, char* shared) {
    const typename Product::Ring ring(shared, shared + kBarriers);
    Mbarrier* stored = reinterpret_cast<Mbarrier*>(shared + kStored);  // the engine has read the tile before new rows
    if (thread_index() == 0) mbarrier_init(stored, kGroups);
    const int stages = tiles_of(args.K, kBlockK);
    const auto load = [&] {
      prefetch(args.x), prefetch(args.weight), prefetch(args.lora_A);
      typename Product::PipelineState state;
      int parity = 0;
      each_tile(args, [&](int row_0, int column_0, bool new_rows, bool first) {
        if (new_rows && !first) mbarrier_wait(stored, parity), parity ^= 1;
        for (int k_0 = 0; k_0 < args.K; k_0 += kBlockK) {
          const auto stage = Product::open(ring, state, Product::kStageBytes + (new_rows ? kRankBytes : 0));
          Product::load_left(stage, args.x, row_0, k_0);
          Product::load_right(stage, args.weight, column_0, k_0);
          if (new_rows) {
            load_box<false>(shared + kOut + stage.index * kRankStride, args.lora_A, 0, k_0, stage.full, 0);
          }
        }
        Product::load_right(Product::open(ring, state, Product::kRightBytes), args.lora_B, column_0, 0);
      });
    };
    const auto multiply = [&] {
      typename Product::PipelineState state;
      uint32_t s[kSteps][4] = {};  // this thread's two rows, as wgmma takes them
      each_tile(args, [&](int row_0, int column_0, bool new_rows, bool first) {
        row_0 += group() * kGroupRows;
        float sums[kSums];
        typename Product::Flow flow;
        if (new_rows) {
          if (!first && is_first()) {
            stores_wait<0>();
            mbarrier_arrive_at(stored, cluster_rank());
          }
          float low[kRanks / 2], factors[2];
          load_factors(args, row_0 + row_of_group(), factors);  // while nothing waits for them
          const auto also = [&](int at, int step, uint64_t rows, bool onto) {
            const uint64_t ranks = operand_at<true>(shared + kOut + at * kRankStride, 0);
            wgmma<T, true, true>(low, rows, ranks + step * kOperandStep<true>, onto);
          };
          flow = Product::multiply_stages(ring, state, stages, also, sums, low);
          Product::finish(flow, sums, low);
          round(args, factors, low, s);
          if (column_0 == 0) store_s(args, row_0 + row_of_group(), s);
          sync_named(1 + kGroups, kGroups * kWarpgroup);  // both have read A's boxes, where y goes now
        } else {
          flow = Product::multiply_stages(ring, state, stages, sums);
        }
        Product::multiply_registers(ring, state, flow, s, sums);
        const BiasPairs<T, kSums> bias(args.bias, args.columns, column_0 + 2 * (lane() % 4));
        Product::finish(flow, sums);
        bias.add_to(sums);
        store_tile<T, Product>(args.y, shared + kOut, row_0, column_0, sums);
      });
      if (is_first()) stores_wait<0>();
    };
    Product::specialise(ring, load, multiply);
  }

 private:
  // A cluster's tiles, row by row of them: of(row_0, column_0, whether it is the first of its rows, and the first of all).
  template <typename Of>
  PEFT_KERNELS_DEVICE static void each_tile(const BoxArguments& args, const Of& of) {
    const int across = tiles_of(args.columns, BoxWide::kColumns);
    const int all = across * tiles_of(args.rows, kCluster * BoxWide::kRows);
    const int begin = block_index() / kCluster * args.per_cluster;
    for (int tile = begin; tile < begin + args.per_cluster && tile < all; ++tile) {
      const int row_0 = (tile / across * kCluster + cluster_rank()) * BoxWide::kRows, column = tile % across;
      of(row_0, column * BoxWide::kColumns, tile == begin || column == 0, tile == begin);
    }
  }

  // Of rows `row` and row + 8.
  PEFT_KERNELS_DEVICE static void load_factors(const BoxArguments& args, int row, float (&factors)[2]) {
    PEFT_KERNELS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const bool scaled = args.row_scale != nullptr && row + 8 * half < args.rows;
      factors[half] = args.scale * (scaled ? args.row_scale[row + 8 * half] : 1.0f);
    }
  }

  // S of both, zero behind the last rank whatever x is.
  PEFT_KERNELS_DEVICE static void round(const BoxArguments& args, const float (&factors)[2],
                                        const float (&low)[kRanks / 2], uint32_t (&s)[kSteps][4]) {
    PEFT_KERNELS_UNROLL
    for (int at = 0; at < kRanks / 4; ++at) {
      const int column = 8 * (at / 2) + 2 * (lane() % 4);
      const T pair[2] = {T(column < args.rank ? low[2 * at] * factors[at % 2] : 0.0f),
                         T(column + 1 < args.rank ? low[2 * at + 1] * factors[at % 2] : 0.0f)};
      std::memcpy(&s[at / 4][at % 4], pair, sizeof(pair));
    }
  }

  PEFT_KERNELS_DEVICE static void store_s(const BoxArguments& args, int row, const uint32_t (&s)[kSteps][4]) {
    const int width = (args.rank + 7) / 8 * 8;
    PEFT_KERNELS_UNROLL
    for (int at = 0; at < kRanks / 4; ++at) {
      const int at_row = row + 8 * (at % 2), column = 8 * (at / 2) + 2 * (lane() % 4);
      if (at_row >= args.rows || column >= width) continue;
      static_cast<uint32_t*>(args.s)[(static_cast<int64_t>(at_row) * width + column) / 2] = s[at / 4][at % 4];
    }
  }
};

}  // namespace peft_kernels::lora_forward
