// The tiles of the GEMM, which of them a shape takes, which a block computes, and how blocks share a length. Plain
// arithmetic, for host and GPU.
#pragma once

#include "common/host_device.h"

#include <cstdint>

namespace peft_kernels {

// kRows x kColumns of out by warps of kWarpRows x kWarpColumns, kBlockK elements of the reduction a stage.
template <int kRows_, int kColumns_, int kBlockK_, int kWarpRows_, int kWarpColumns_, int kStages_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kBlockK = kBlockK_;
  static constexpr int kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_, kStages = kStages_;
  static constexpr int kThreads = kRows / kWarpRows * (kColumns / kWarpColumns) * 32;
};

// By size, in 66 to 84 KiB of shared memory: sm_86 and sm_89 have 99 KiB, sm_80 twice as much for two blocks.
using Wide = Tile<128, 256, 32, 64, 64, 3>;
using Square = Tile<128, 128, 32, 64, 64, 4>;
using Small = Tile<64, 64, 64, 32, 32, 4>;

// kRows x kColumns of out by warpgroups of 64 rows, 64 elements of the reduction a stage. A cluster of tiles shares loads: kDown
// tiles, one above another, those of their columns; kAcross, side by side, those of their rows. In 225 of the 227 KiB of
// shared memory that a block of sm_90 may have.
template <int kRows_, int kColumns_, int kStages_, int kDown_, int kAcross_>
struct BoxTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kStages = kStages_;
  static constexpr int kDown = kDown_, kAcross = kAcross_, kCluster = kDown * kAcross;
  static_assert(kDown == 1 || kAcross == 1);
};

// The square tile is also the one of few rows, of which none must be left out: its cluster lies across.
using BoxWide = BoxTile<128, 256, 4, 2, 1>;
using BoxSquare = BoxTile<128, 128, 6, 1, 2>;

PEFT_KERNELS_HOST_DEVICE int tiles_of(int64_t size, int tile) { return static_cast<int>((size + tile - 1) / tile); }

// Of out [rows, columns], whole clusters.
template <typename Tile>
PEFT_KERNELS_HOST_DEVICE int64_t clusters_of(int64_t rows, int64_t columns) {
  return static_cast<int64_t>(tiles_of(rows, Tile::kDown * Tile::kRows)) * tiles_of(columns, Tile::kAcross * Tile::kColumns);
}

// Of a length that several blocks share: one's part, a multiple of `stage`.
PEFT_KERNELS_HOST_DEVICE int slice_of(int64_t length, int parts, int stage) {
  return tiles_of(length, parts * stage) * stage;
}

// In how many parts: for up to two blocks an SM, at most 32, of four stages and more but for the last.
PEFT_KERNELS_HOST_DEVICE int splits_of(int64_t length, int stage, int64_t blocks, int processors) {
  const int64_t wanted = blocks > 0 ? 2 * static_cast<int64_t>(processors) / blocks : 1;
  const int64_t most = length / (4 * stage) < 32 ? length / (4 * stage) : 32;
  const int64_t taken = wanted < most ? wanted : most;
  return taken > 1 ? tiles_of(length, slice_of(length, static_cast<int>(taken), stage)) : 1;
}

struct TileCoordinate {
  int row, column;  // in tiles
};

// Neighbouring blocks share rows and columns, which the L2 cache then holds: eight rows of tiles, column by column.
PEFT_KERNELS_HOST_DEVICE TileCoordinate swizzled_tile(int block, int rows, int columns, int tile_rows, int tile_columns) {
  constexpr int kGroupM = 8;
  const int down = tiles_of(rows, tile_rows), across = tiles_of(columns, tile_columns);
  const int group = block / (kGroupM * across), first = group * kGroupM;
  const int height = down - first < kGroupM ? down - first : kGroupM;
  const int inside = block - group * kGroupM * across;
  return {first + inside % height, inside / height};
}

enum class TileName { kWide, kSquare, kSmall, kBoxWide, kBoxSquare };

// Whether a tile is multiplied by sm_90a's own instructions.
inline bool of_boxes(TileName tile) { return tile == TileName::kBoxWide || tile == TileName::kBoxSquare; }

struct Candidate {
  TileName name;
  int rows, columns;
  int down, across;  // tiles that run together
  int blocks;        // an SM, by shared memory
  int step;          // cycles for 16 of K
  bool splits;       // K, where there are few tiles
};

// A step of 16 of K costs the tensor cores rows·columns·16 / 1024 cycles (sm_80), and shared memory the bytes that all
// warps read / 128; both are added, as if nothing overlapped.
template <typename Tile>
constexpr Candidate warps_candidate(TileName name, int blocks, bool splits) {
  constexpr int kWarps = Tile::kThreads / 32;
  return {name, Tile::kRows, Tile::kColumns, 1, 1, blocks,
          Tile::kRows * Tile::kColumns * 16 / 1024 + kWarps * (Tile::kWarpRows + Tile::kWarpColumns) * 32 / 128, splits};
}

// wgmma (sm_90a) multiplies twice as much a cycle while operands arrive, so that the slowest of three counts: the tensor
// cores; the L2 cache, which gives an SM about 46.6 bytes a cycle, a cluster's shared operand once; shared memory at 128 bytes
// a cycle, written by the copy engine, and read by each warpgroup of 64 rows, which reads all columns.
template <typename Tile>
constexpr Candidate boxes_candidate(TileName name, bool splits) {
  constexpr int kBytes = 16 * 2;  // of a row or a column
  constexpr int kTensor = Tile::kRows * Tile::kColumns * 16 / 2048;
  constexpr int kCached = (Tile::kRows / Tile::kAcross + Tile::kColumns / Tile::kDown) * kBytes * 10 / 466;
  constexpr int kShared = (2 * Tile::kRows + (1 + Tile::kRows / 64) * Tile::kColumns) * kBytes / 128;
  constexpr int kMemory = kCached > kShared ? kCached : kShared;
  return {name, Tile::kRows, Tile::kColumns, Tile::kDown, Tile::kAcross, 1, kTensor > kMemory ? kTensor : kMemory, splits};
}

// The tile of the least estimated time on a GPU of `processors` SMs: waves of blocks, times what a block's step costs, of a
// K that can be split as often as there are blocks too few. No measurement is behind it yet, so that a sixteenth decides
// nothing: of two as good as each other the larger is taken, which moves fewer bytes. `boxes`: whether the tiles for sm_90a
// can be taken.
inline TileName choose(int64_t rows, int64_t columns, int processors, bool boxes) {
  constexpr Candidate kCandidates[] = {  // the larger first
      boxes_candidate<BoxWide>(TileName::kBoxWide, false), boxes_candidate<BoxSquare>(TileName::kBoxSquare, true),
      warps_candidate<Wide>(TileName::kWide, 1, false),    warps_candidate<Square>(TileName::kSquare, 2, false),
      warps_candidate<Small>(TileName::kSmall, 2, true),
  };
  TileName best = TileName::kSmall;
  int64_t least = INT64_MAX / 16;
  for (const Candidate& tile : kCandidates) {
    if (!boxes && of_boxes(tile.name)) continue;
    const int64_t clusters = static_cast<int64_t>(tiles_of(rows, tile.rows * tile.down)) *
                             tiles_of(columns, tile.columns * tile.across);
    const int64_t blocks = clusters * tile.down * tile.across;
    const int64_t at_once = static_cast<int64_t>(processors) * tile.blocks;
    const int64_t full = blocks / at_once, rest = blocks % at_once;
    // Blocks that share an SM share its tensor cores; in the last wave an SM may have fewer.
    int64_t time = (full * tile.blocks + (rest + processors - 1) / processors) * tile.step;
    if (tile.splits && blocks < at_once) time /= at_once / blocks < 32 ? at_once / blocks : 32;
    if (16 * time < 15 * least) least = time, best = tile.name;
  }
  return best;
}

}  // namespace peft_kernels
