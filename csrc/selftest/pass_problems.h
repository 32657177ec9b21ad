// The problems of the passes over x and dy: dropout's mask, shrink, outer, and the sum of their partial results.
#pragma once

#include "common/reduce_partials_kernel.cuh"
#include "ops/dropout/arguments.h"
#include "ops/lora_linear/outer_sm80.cuh"
#include "ops/lora_linear/shrink_sm80.cuh"
#include "selftest/problem.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace peft_kernels::selftest {

// --- draw_mask ------------------------------------------------------------------------------------------------

struct MaskProblem {
  int64_t rows, groups, streams;
  static constexpr int64_t kSeed = -7;
  static constexpr int32_t kThreshold = -26214;  // p = 0.1

  int64_t numel() const { return rows * groups * streams; }
  dropout::Arguments arguments(const int64_t* seed, uint8_t* mask) const {
    return {seed, mask, rows, groups, numel(), kThreshold};
  }
  // Byte by byte, as the contract has it.
  std::vector<uint8_t> expected() const {
    std::vector<uint8_t> bytes;
    for (int64_t at = 0; at < numel(); ++at) {
      bytes.push_back(dropout::kept_byte(static_cast<uint64_t>(kSeed), at / groups % rows,
                                         static_cast<uint32_t>(at % groups),
                                         static_cast<uint32_t>(at / groups / rows), kThreshold));
    }
    return bytes;
  }
};

// Rows shorter than what a thread draws, of that size, and longer; ends within a thread's bytes.
inline std::vector<MaskProblem> mask_problems() { return {{1, 1, 1}, {33, 9, 2}, {100, 16, 1}, {512, 72, 3}}; }

// --- shrink ---------------------------------------------------------------------------------------------------

template <typename T>
class ShrinkProblem {
 public:
  const int rows, K, width, streams, splits;
  const bool by_feature, dropping;

  ShrinkProblem(int rows, int K, int width, int streams, int splits, bool by_feature, bool dropping)
      : rows(rows),
        K(K),
        width(width),
        streams(streams),
        splits(splits),
        by_feature(by_feature),
        dropping(dropping),
        random_(rows + K * 3),
        activation_(rows, K, random_, 1.0),
        rank_factor_(by_feature ? streams * width : K, by_feature ? K : width, random_, 1.0) {}

  std::string text() const {
    return std::to_string(rows) + " x " + std::to_string(streams) + " * " + std::to_string(width) + " x " +
           std::to_string(K) + " in " + std::to_string(splits) + (by_feature ? ", by feature" : ", by K") +
           (dropping ? ", dropout" : "");
  }
  const std::vector<T>& activation_values() const { return activation_.values; }
  const std::vector<T>& rank_factor_values() const { return rank_factor_.values; }
  size_t results() const { return static_cast<size_t>(splits) * rows * streams * width; }
  size_t mask_bytes() const { return static_cast<size_t>(streams) * rows * ((K + 7) / 8); }
  int part() const { return slice_of(K, splits, lora_shrink::kBlockK); }

  lora_shrink::Arguments arguments(const T* activation, const T* rank_factor, float* partials, const int64_t* seed,
                                   uint8_t* mask) const {
    return {activation,
            activation_.pitch,
            rank_factor,
            rank_factor_.pitch,
            partials,
            dropping ? seed : nullptr,
            dropping ? mask : nullptr,
            MaskProblem::kThreshold,
            rows,
            K,
            width,
            streams,
            splits,
            part()};
  }

  std::string complaint(const std::vector<float>& partials, const std::vector<uint8_t>& mask) const {
    const std::vector<uint8_t> bits = MaskProblem{rows, (K + 7) / 8, streams}.expected();
    if (dropping && !std::equal(bits.begin(), bits.end(), mask.begin())) return "another mask";
    for (int split = 0; split < splits; ++split) {
      for (int row = 0; row < rows; ++row) {
        for (int column = 0; column < streams * width; ++column) {
          double sum = 0.0, size = 0.0;
          for (int k = split * part(); k < std::min(K, (split + 1) * part()); ++k) {
            const size_t byte = (static_cast<size_t>(column / width) * rows + row) * ((K + 7) / 8) + k / 8;
            if (dropping && !(bits[byte] >> k % 8 & 1)) continue;
            const double term = selftest::wide(activation_.at(row, k)) *
                                selftest::wide(by_feature ? rank_factor_.at(column, k) : rank_factor_.at(k, column));
            sum += term, size += std::abs(term);
          }
          const float found = partials[(static_cast<size_t>(split) * rows + row) * streams * width + column];
          const std::string wrong = differs(found, sum, size, part());
          if (wrong.empty()) continue;
          return "(" + std::to_string(split) + ", " + std::to_string(row) + ", " + std::to_string(column) + ")" + wrong;
        }
      }
    }
    return "";
  }

 private:
  std::mt19937 random_;
  const Matrix<T> activation_, rank_factor_;
};

// One element, sizes off the tile, several blocks each way, parts that end within a tile.
template <typename T>
std::vector<ShrinkProblem<T>> shrinks() {
  std::vector<ShrinkProblem<T>> found;
  for (const bool dropping : {false, true}) {
    found.emplace_back(1, 1, 1, 1, 1, true, dropping);
    found.emplace_back(70, 200, 6, 1, 1, true, dropping);
    found.emplace_back(65, 300, 16, 3, 2, true, dropping);
    found.emplace_back(20, 130, 24, 2, 2, true, dropping);
    found.emplace_back(33, 576, 100, 1, 3, true, dropping);
  }
  found.emplace_back(1, 1, 1, 1, 1, false, false);
  found.emplace_back(130, 203, 6, 1, 2, false, false);
  found.emplace_back(65, 300, 100, 1, 1, false, false);
  found.emplace_back(20, 130, 24, 1, 2, false, false);
  return found;
}

// --- outer ----------------------------------------------------------------------------------------------------

template <typename T>
class OuterProblem {
 public:
  const int rows, columns, width, parts;
  const bool shrinks, transposed;
  const int masks, streams;
  const int start;  // of the masks: so many bytes behind 16

  OuterProblem(int rows, int columns, int width, int parts, bool shrinks, int masks, bool transposed, int streams = 1,
               int start = 0)
      : rows(rows),
        columns(columns),
        width(width),
        parts(parts),
        shrinks(shrinks),
        transposed(transposed),
        masks(masks),
        streams(streams),
        start(start),
        random_(rows + columns * 3),
        activation_(rows, columns, random_, 1.0),
        rank_factor_(rows, streams * width, random_, 1.0),
        lora_B_(columns, width, random_, 1.0),
        keep_(start + static_cast<size_t>(masks) * rows * pitch()) {
    for (uint8_t& byte : keep_) byte = static_cast<uint8_t>(random_());
  }

  std::string text() const {
    return std::to_string(rows) + " x " + std::to_string(columns) + " x " + std::to_string(width) + " in " +
           std::to_string(parts) + (shrinks ? ", shrinks" : "") + (masks ? ", " + std::to_string(masks) + " masks" : "") +
           (transposed ? ", transposed" : "") + (streams > 1 ? ", " + std::to_string(streams) + " streams" : "") +
           (start ? ", from byte " + std::to_string(start) : "");
  }
  const std::vector<T>& activation_values() const { return activation_.values; }
  const std::vector<T>& rank_factor_values() const { return rank_factor_.values; }
  const std::vector<T>& lora_B_values() const { return lora_B_.values; }
  const std::vector<uint8_t>& dropout_mask() const { return keep_; }
  size_t sums() const { return static_cast<size_t>(parts) * streams * columns * width; }
  size_t shrunk() const {
    return shrinks ? static_cast<size_t>(tiles_of(columns, lora_outer::kSlice)) * rows * width : 0;
  }

  lora_outer::Arguments arguments(const T* activation, const T* rank_factor, const T* right, const uint8_t* dropout_mask, float* sums,
                                  float* shrunk) const {
    return {activation,
            activation_.pitch,
            rank_factor,
            rank_factor_.pitch,
            shrinks ? right : nullptr,
            lora_B_.pitch,
            masks ? dropout_mask + start : nullptr,
            sums,
            shrunk,
            rows,
            columns,
            width,
            streams,
            std::max(masks, 1),
            parts,
            part(),
            transposed};
  }

  std::string complaint(const std::vector<float>& sums, const std::vector<float>& shrunk) const {
    for (int place = 0; place < parts * streams; ++place) {
      const int p = place / streams, stream = place % streams;
      for (int column = 0; column < columns; ++column) {
        for (int rank = 0; rank < width; ++rank) {
          double sum = 0.0, size = 0.0;
          for (int row = p * part(); row < std::min(rows, (p + 1) * part()); ++row) {
            const size_t mask = static_cast<size_t>(stream) * masks / streams;
            if (masks && !(keep_[start + (mask * rows + row) * pitch() + column / 8] >> column % 8 & 1)) continue;
            const double term =
                selftest::wide(activation_.at(row, column)) * selftest::wide(rank_factor_.at(row, stream * width + rank));
            sum += term, size += std::abs(term);
          }
          const int at = transposed ? rank * columns + column : column * width + rank;
          const std::string wrong =
              differs(sums[static_cast<size_t>(place) * columns * width + at], sum, size, part());
          if (!wrong.empty()) return "sums of column " + std::to_string(column) + wrong;
        }
      }
    }
    for (size_t at = 0; at < this->shrunk(); ++at) {
      const int rank = static_cast<int>(at % width), row = static_cast<int>(at / width % rows);
      const int first = static_cast<int>(at / width / rows) * lora_outer::kSlice;
      double sum = 0.0, size = 0.0;
      for (int column = first; column < std::min(columns, first + lora_outer::kSlice); ++column) {
        const double term = selftest::wide(activation_.at(row, column)) * selftest::wide(lora_B_.at(column, rank));
        sum += term, size += std::abs(term);
      }
      const std::string wrong = differs(shrunk[at], sum, size, lora_outer::kSlice);
      if (!wrong.empty()) return "shrunk of row " + std::to_string(row) + wrong;
    }
    return "";
  }

 private:
  int part() const { return slice_of(rows, parts, lora_outer::kRows); }
  int pitch() const { return (columns + 7) / 8; }

  std::mt19937 random_;
  const Matrix<T> activation_, rank_factor_, lora_B_;
  std::vector<uint8_t> keep_;
};

// Widths up to 16. One element, sizes off the tile, several slices and parts, parts that end within a tile; rows of masks of
// every alignment, more stages than there are places for them.
template <typename T>
std::vector<OuterProblem<T>> outers(int width) {
  std::vector<OuterProblem<T>> found;
  for (const bool shrinks : {false, true}) {
    if (shrinks && width > 32) continue;
    found.emplace_back(1, 1, 1, 1, shrinks, 0, false);
    found.emplace_back(70, 200, width, 1, shrinks, 0, false);
    found.emplace_back(300, 264, width - 3, 2, shrinks, 0, false);
  }
  found.emplace_back(70, 200, width, 1, false, 1, true);
  found.emplace_back(300, 71, width - 3, 3, false, 1, true);
  found.emplace_back(140, 200, width - 8, 2, false, 3, true, 3);
  found.emplace_back(90, 140, width, 2, false, 2, true, 4);
  found.emplace_back(90, 140, width, 1, false, 0, true, 2);
  found.emplace_back(333, 128, width, 1, false, 1, true);
  found.emplace_back(70, 320, width, 1, false, 1, true, 1, 5);
  found.emplace_back(150, 96, width, 2, false, 2, true, 2, 2);
  return found;
}

// --- reduce_partials ---------------------------------------------------------------------------------------------

template <typename Out>
struct Reduction {
  int partials, rows, rank;
  bool scaled;
  int pitch;  // of a row
  std::vector<float> values, row_scale;

  Reduction(int partials, int rows, int rank, bool scaled, int apart = 0)
      : partials(partials), rows(rows), rank(rank), scaled(scaled), pitch(rank + apart), row_scale(rows) {
    std::mt19937 random(partials);
    std::normal_distribution<float> normal;
    values.resize(static_cast<size_t>(partials) * stride());
    for (float& value : values) value = normal(random);
    for (float& scale : row_scale) scale = normal(random);
  }

  int64_t numel() const { return static_cast<int64_t>(rows) * rank; }
  int64_t stride() const { return (static_cast<int64_t>(rows) * pitch + 3) / 4 * 4; }  // every partial on 16 bytes
  reduction::Sum sum(const float* on_values, const float* on_scale, Out* out) const {
    return {on_values, stride(), partials, pitch, scaled ? on_scale : nullptr, 0.5f, numel(), rank, out};
  }
  // In float32 and in ascending order: the same bits.
  std::string complaint(const std::vector<Out>& out) const {
    for (int64_t i = 0; i < numel(); ++i) {
      float sum = 0.0f;
      for (int p = 0; p < partials; ++p) sum += values[p * stride() + i / rank * pitch + i % rank];
      const Out wanted = static_cast<Out>(sum * (scaled ? 0.5f * row_scale[i / rank] : 0.5f));
      if (std::memcmp(&wanted, &out[i], sizeof(Out)) != 0) return "other bits at " + std::to_string(i);
    }
    return "";
  }
};

template <typename Out>
std::vector<Reduction<Out>> reductions() {
  return {{1, 1, 1, false},  {5, 33, 6, true},     {3, 130, 16, false},
          {16, 41, 3, true}, {2, 70, 8, true, 24}, {3, 9, 12, false, 4}};
}

// All by one launch: adds a sum's share of threads, and says how many blocks there are now.
template <int kWidth>
int append(reduction::Arguments& args, const reduction::Sum& sum) {
  const int64_t before = args.count ? args.ends[args.count - 1] : 0;
  args.sums[args.count] = sum;
  args.ends[args.count++] = before + reduction::threads_of<kWidth>(sum);
  return static_cast<int>((args.ends[args.count - 1] + reduction::kThreads - 1) / reduction::kThreads);
}

}  // namespace peft_kernels::selftest
