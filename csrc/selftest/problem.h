// The kernels' problems for the self-test: operands with margins, what comes out, and by how much it may differ.
#pragma once

#include "dropout/arguments.h"
#include "lora_linear/gemm.h"
#include "lora_linear/outer_sm80.h"
#include "lora_linear/shrink_sm80.h"
#include "common/split_reduce_kernel.h"
#include "sparse_delta/gathered.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace peft_kernels::selftest {

// Bytes of 0xFF: NaN in every floating-point type.
template <typename T>
std::vector<T> poisoned(size_t size) {
  std::vector<T> values(size);
  std::memset(static_cast<void*>(values.data()), 0xFF, size * sizeof(T));
  return values;
}

template <typename T>
double wide(T value) {
  return static_cast<double>(static_cast<float>(value));
}

// --- lora_gemm ------------------------------------------------------------------------------------------------

struct Shape {
  int rows, columns, depth, rank;
  bool by_feature, masked, with_bias;
  int pairs = 1;

  // Each pair has its own, the first those above.
  int depth_of(int pair) const { return depth + 24 * pair; }
  int rank_of(int pair) const { return rank + 5 * pair; }
  std::string text() const {
    return std::to_string(rows) + " x " + std::to_string(columns) + " x " + std::to_string(depth) + " + " +
           std::to_string(rank) + (by_feature ? ", by feature" : ", by depth") + (masked ? ", masked" : "") +
           (with_bias ? ", bias" : "") + (pairs > 1 ? ", " + std::to_string(pairs) + " pairs" : "");
  }
};

// Every edge: one element, sizes off the tile, ranks of 0, 1 and past a stage, several tiles each way; rows of the mask
// that start on 8 bytes, and others.
inline std::vector<Shape> shapes(bool large) {
  std::vector<Shape> found;
  for (const bool by_feature : {true, false}) {
    for (const bool masked : {false, true}) {
      for (const bool with_bias : {false, true}) {
        found.push_back({1, 1, 1, 1, by_feature, masked, with_bias});
        found.push_back({65, 72, 64, 16, by_feature, masked, with_bias});
        found.push_back({130, 71, 200, 6, by_feature, masked, with_bias});
      }
      found.push_back({70, 320, 96, 100, by_feature, masked, false});
      found.push_back({5, 8, 16, 0, by_feature, masked, true});
      found.push_back({17, 24, 0, 4, by_feature, masked, true});
      found.push_back({70, 136, 130, 0, by_feature, masked, true, 3});
      found.push_back({5, 72, 0, 60, by_feature, masked, false, 2});
      if (large && masked) {
        found.push_back({512, 1000, 1024, 16, by_feature, masked, true});
        found.push_back({333, 1032, 520, 130, by_feature, masked, true});
      }
    }
  }
  return found;
}

// What the tiles for sm_90a take: rows of out that start on 16 bytes, and a depth. Of less than a box, several clusters of
// tiles each way, tiles beyond the last row, more stages than the ring has.
inline std::vector<Shape> box_shapes(bool large) {
  std::vector<Shape> found;
  for (const bool by_feature : {true, false}) {
    for (const bool masked : {false, true}) {
      found.push_back({1, 8, 1, 1, by_feature, masked, true});
      found.push_back({70, 264, 200, 6, by_feature, masked, true});
      found.push_back({300, 520, 72, 100, by_feature, masked, false});
      found.push_back({140, 320, 600, 0, by_feature, masked, false});
      found.push_back({140, 320, 60, 60, by_feature, masked, true, 3});
      if (large && masked) found.push_back({1030, 1000, 1024, 16, by_feature, masked, true});
    }
  }
  return found;
}

// [height, width], every row on 16 bytes; what no one may read is NaN.
template <typename T>
struct Matrix {
  int height, width;
  int64_t pitch;
  std::vector<T> values;

  Matrix(int height, int width, std::mt19937& random, double scale)
      : height(height), width(width), pitch((width + 7) / 8 * 8 + 8), values(poisoned<T>(height * pitch + 8)) {
    std::normal_distribution<float> normal(0.0f, static_cast<float>(scale));
    for (int row = 0; row < height; ++row) {
      for (int column = 0; column < width; ++column) values[row * pitch + column] = T(normal(random));
    }
  }
  T at(int row, int column) const { return values[row * pitch + column]; }
};

template <typename T>
class Problem {
 public:
  // The operands of a pair.
  struct Operands {
    Matrix<T> left, right;

    Operands(const Shape& s, int depth, double scale, std::mt19937& random)
        : left(s.rows, depth, random, 1.0),
          right(s.by_feature ? s.columns : depth, s.by_feature ? depth : s.columns, random, scale) {}
    lora_gemm::Pair at(const T* on_left, const T* on_right) const {
      return {on_left, left.pitch, on_right, right.pitch, left.width};
    }
  };

  const Shape shape;
  std::mt19937 random;
  std::vector<Operands> base, low;
  const Matrix<T> bias;
  std::vector<uint8_t> keep;

  explicit Problem(const Shape& s)
      : shape(s),
        random(s.rows * 31 + s.columns * 17 + s.depth),
        bias(1, s.columns, random, 1.0),
        keep(static_cast<size_t>(s.rows) * ((s.columns + 7) / 8)) {
    for (int pair = 0; pair < s.pairs; ++pair) {
      base.emplace_back(s, s.depth_of(pair), 0.1, random);
      low.emplace_back(s, s.rank_of(pair), 0.3, random);
    }
    for (uint8_t& byte : keep) byte = static_cast<uint8_t>(random());
    expect();
  }

  // On the host; `out` and `partials` are the caller's.
  lora_gemm::Arguments arguments(T* out, float* partials = nullptr, int parts = 1) const {
    lora_gemm::Arguments args{};
    for (int j = 0; j < shape.pairs; ++j) {
      args.base[j] = base[j].at(base[j].left.values.data(), base[j].right.values.data());
      args.low[j] = low[j].at(low[j].left.values.data(), low[j].right.values.data());
    }
    args.pairs = shape.pairs;
    args.keep = shape.masked ? keep.data() : nullptr;
    args.bias = shape.with_bias ? bias.values.data() : nullptr;
    args.out = out;
    args.rows = shape.rows, args.columns = shape.columns;
    args.partials = partials;
    args.parts = parts, args.part = part_of(stages(), parts, 1);
    return args;
  }

  size_t size() const { return static_cast<size_t>(shape.rows) * shape.columns; }
  int parts() const {
    const int most = stages();
    return most < 3 ? most : tiles_of(most, tiles_of(most, 3));
  }

  // The sum of partials, for `complaint`.
  std::vector<T> reduced(const std::vector<float>& partials, int parts) const {
    std::vector<T> out(size());
    for (size_t i = 0; i < size(); ++i) {
      float sum = 0.0f;
      for (int part = 0; part < parts; ++part) sum += partials[part * size() + i];
      out[i] = T(sum);
    }
    return out;
  }

  // "" where `out` is right.
  std::string complaint(const std::vector<T>& out) const {
    for (size_t i = 0; i < expected_.size(); ++i) {
      if (std::abs(wide(out[i]) - expected_[i]) <= allowed_[i]) continue;  // not for NaN
      return "expected " + std::to_string(expected_[i]) + " at (" + std::to_string(i / shape.columns) + ", " +
             std::to_string(i % shape.columns) + "), got " + std::to_string(wide(out[i]));
    }
    return "";
  }

 private:
  std::vector<double> expected_, allowed_;  // [rows, columns]

  int stages() const {
    int stages = 0;
    for (int pair = 0; pair < shape.pairs; ++pair) stages += tiles_of(shape.depth_of(pair), Small::kDepth);
    return stages;
  }

  // In float64; what may differ is float32's rounding of every sum, and one rounding to T.
  void expect() {
    constexpr double kRounding = std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
    int terms = 0;
    for (int pair = 0; pair < shape.pairs; ++pair) terms += shape.depth_of(pair) + shape.rank_of(pair);
    const auto add = [this](const std::vector<Operands>& operands, int row, int column, double& sum, double& size) {
      for (const auto& [left, right] : operands) {
        for (int k = 0; k < left.width; ++k) {
          const double term = wide(left.at(row, k)) * wide(shape.by_feature ? right.at(column, k) : right.at(k, column));
          sum += term, size += std::abs(term);
        }
      }
    };
    for (int row = 0; row < shape.rows; ++row) {
      for (int column = 0; column < shape.columns; ++column) {
        double sum = 0.0, size = 0.0;
        add(low, row, column, sum, size);
        const uint8_t bits = keep[static_cast<size_t>(row) * ((shape.columns + 7) / 8) + column / 8];
        if (shape.masked && !(bits >> column % 8 & 1)) sum = 0.0;
        add(base, row, column, sum, size);
        if (shape.with_bias) sum += wide(bias.at(0, column));
        expected_.push_back(sum);
        allowed_.push_back(kRounding * std::abs(sum) + terms * 0x1p-24 * size + 0x1p-24);
      }
    }
  }
};

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
  const int rows, depth, width, streams, splits;
  const bool by_feature, dropping;

  ShrinkProblem(int rows, int depth, int width, int streams, int splits, bool by_feature, bool dropping)
      : rows(rows),
        depth(depth),
        width(width),
        streams(streams),
        splits(splits),
        by_feature(by_feature),
        dropping(dropping),
        random_(rows + depth * 3),
        wide_(rows, depth, random_, 1.0),
        narrow_(by_feature ? streams * width : depth, by_feature ? depth : width, random_, 1.0) {}

  std::string text() const {
    return std::to_string(rows) + " x " + std::to_string(streams) + " * " + std::to_string(width) + " x " +
           std::to_string(depth) + " in " + std::to_string(splits) + (by_feature ? ", by feature" : ", by depth") +
           (dropping ? ", dropout" : "");
  }
  const std::vector<T>& wide_values() const { return wide_.values; }
  const std::vector<T>& narrow_values() const { return narrow_.values; }
  size_t results() const { return static_cast<size_t>(splits) * rows * streams * width; }
  size_t mask_bytes() const { return static_cast<size_t>(streams) * rows * ((depth + 7) / 8); }
  int part() const { return part_of(depth, splits, lora_shrink::kDepth); }

  lora_shrink::Arguments arguments(const T* wide, const T* narrow, float* partials, const int64_t* seed,
                                   uint8_t* mask) const {
    return {wide,
            wide_.pitch,
            narrow,
            narrow_.pitch,
            partials,
            dropping ? seed : nullptr,
            dropping ? mask : nullptr,
            MaskProblem::kThreshold,
            rows,
            depth,
            width,
            streams,
            splits,
            part()};
  }

  std::string complaint(const std::vector<float>& partials, const std::vector<uint8_t>& mask) const {
    const std::vector<uint8_t> bits = MaskProblem{rows, (depth + 7) / 8, streams}.expected();
    if (dropping && !std::equal(bits.begin(), bits.end(), mask.begin())) return "another mask";
    for (int split = 0; split < splits; ++split) {
      for (int row = 0; row < rows; ++row) {
        for (int column = 0; column < streams * width; ++column) {
          double sum = 0.0, size = 0.0;
          for (int k = split * part(); k < std::min(depth, (split + 1) * part()); ++k) {
            const size_t byte = (static_cast<size_t>(column / width) * rows + row) * ((depth + 7) / 8) + k / 8;
            if (dropping && !(bits[byte] >> k % 8 & 1)) continue;
            const double term = selftest::wide(wide_.at(row, k)) *
                                selftest::wide(by_feature ? narrow_.at(column, k) : narrow_.at(k, column));
            sum += term, size += std::abs(term);
          }
          const float found = partials[(static_cast<size_t>(split) * rows + row) * streams * width + column];
          if (std::abs(found - sum) <= (part() + 2) * 0x1p-24 * size) continue;  // not for NaN
          return "expected " + std::to_string(sum) + " at (" + std::to_string(split) + ", " + std::to_string(row) +
                 ", " + std::to_string(column) + "), got " + std::to_string(found);
        }
      }
    }
    return "";
  }

 private:
  std::mt19937 random_;
  const Matrix<T> wide_, narrow_;
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
  const bool shrinks, masked, transposed;

  OuterProblem(int rows, int columns, int width, int parts, bool shrinks, bool masked, bool transposed)
      : rows(rows),
        columns(columns),
        width(width),
        parts(parts),
        shrinks(shrinks),
        masked(masked),
        transposed(transposed),
        random_(rows + columns * 3),
        wide_(rows, columns, random_, 1.0),
        narrow_(rows, width, random_, 1.0),
        right_(columns, width, random_, 1.0),
        keep_(static_cast<size_t>(rows) * pitch()) {
    for (uint8_t& byte : keep_) byte = static_cast<uint8_t>(random_());
  }

  std::string text() const {
    return std::to_string(rows) + " x " + std::to_string(columns) + " x " + std::to_string(width) + " in " +
           std::to_string(parts) + (shrinks ? ", shrinks" : "") + (masked ? ", masked" : "") +
           (transposed ? ", transposed" : "");
  }
  const std::vector<T>& wide_values() const { return wide_.values; }
  const std::vector<T>& narrow_values() const { return narrow_.values; }
  const std::vector<T>& right_values() const { return right_.values; }
  const std::vector<uint8_t>& keep() const { return keep_; }
  size_t sums() const { return static_cast<size_t>(parts) * columns * width; }
  size_t shrunk() const {
    return shrinks ? static_cast<size_t>(tiles_of(columns, lora_outer::kSlice)) * rows * width : 0;
  }

  lora_outer::Arguments arguments(const T* wide, const T* narrow, const T* right, const uint8_t* keep, float* sums,
                                  float* shrunk) const {
    return {wide,
            wide_.pitch,
            narrow,
            narrow_.pitch,
            shrinks ? right : nullptr,
            right_.pitch,
            masked ? keep : nullptr,
            sums,
            shrunk,
            rows,
            columns,
            width,
            parts,
            part(),
            transposed};
  }

  std::string complaint(const std::vector<float>& sums, const std::vector<float>& shrunk) const {
    for (int p = 0; p < parts; ++p) {
      for (int column = 0; column < columns; ++column) {
        for (int rank = 0; rank < width; ++rank) {
          double sum = 0.0, size = 0.0;
          for (int row = p * part(); row < std::min(rows, (p + 1) * part()); ++row) {
            if (masked && !(keep_[static_cast<size_t>(row) * pitch() + column / 8] >> column % 8 & 1)) continue;
            const double term = selftest::wide(wide_.at(row, column)) * selftest::wide(narrow_.at(row, rank));
            sum += term, size += std::abs(term);
          }
          const int at = transposed ? rank * columns + column : column * width + rank;
          const std::string wrong = differs(sums[static_cast<size_t>(p) * columns * width + at], sum, size, part());
          if (!wrong.empty()) return "sums of column " + std::to_string(column) + wrong;
        }
      }
    }
    for (size_t at = 0; at < this->shrunk(); ++at) {
      const int rank = static_cast<int>(at % width), row = static_cast<int>(at / width % rows);
      const int first = static_cast<int>(at / width / rows) * lora_outer::kSlice;
      double sum = 0.0, size = 0.0;
      for (int column = first; column < std::min(columns, first + lora_outer::kSlice); ++column) {
        const double term = selftest::wide(wide_.at(row, column)) * selftest::wide(right_.at(column, rank));
        sum += term, size += std::abs(term);
      }
      const std::string wrong = differs(shrunk[at], sum, size, lora_outer::kSlice);
      if (!wrong.empty()) return "shrunk of row " + std::to_string(row) + wrong;
    }
    return "";
  }

 private:
  static std::string differs(float found, double sum, double size, int terms) {
    if (std::abs(found - sum) <= (terms + 2) * 0x1p-24 * size) return "";  // not for NaN
    return ": expected " + std::to_string(sum) + ", got " + std::to_string(found);
  }
  int part() const { return part_of(rows, parts, lora_outer::kRows); }
  int pitch() const { return (columns + 7) / 8; }

  std::mt19937 random_;
  const Matrix<T> wide_, narrow_, right_;
  std::vector<uint8_t> keep_;
};

// Widths up to 16. One element, sizes off the tile, several slices and parts, parts that end within a tile.
template <typename T>
std::vector<OuterProblem<T>> outers(int width) {
  std::vector<OuterProblem<T>> found;
  for (const bool shrinks : {false, true}) {
    found.emplace_back(1, 1, 1, 1, shrinks, false, false);
    found.emplace_back(70, 200, width, 1, shrinks, false, false);
    found.emplace_back(300, 264, width - 3, 2, shrinks, false, false);
  }
  found.emplace_back(70, 200, width, 1, false, true, true);
  found.emplace_back(300, 71, width - 3, 3, false, true, true);
  return found;
}

// --- sparse_gathered ------------------------------------------------------------------------------------------

// Integers of 8, 16, 32 or 64 bits, as bytes.
class Integers {
 public:
  explicit Integers(int size) : size_(size) {}
  void push_back(int64_t value) {
    const auto* from = reinterpret_cast<const uint8_t*>(&value);  // the low bytes come first
    bytes_.insert(bytes_.end(), from, from + size_);
  }
  int size() const { return size_; }
  const std::vector<uint8_t>& bytes() const { return bytes_; }

 private:
  int size_;
  std::vector<uint8_t> bytes_;
};

// n_of_m = {0, 0}: entries of a density. Indices as narrow as they go, or wider.
template <typename T>
class GatheredProblem {
 public:
  const int tokens, rows, width, parts, n, m;
  const bool wide_indices;

  GatheredProblem(int tokens, int rows, int width, int parts, double density, int n, int m, bool wide_indices)
      : tokens(tokens), rows(rows), width(width), parts(parts), n(n), m(m), wide_indices(wide_indices),
        random_(tokens + rows * 3 + width * 5), dy_(tokens, rows, random_, 1.0), x_(tokens, width, random_, 1.0),
        starts_(wide_indices ? 8 : 4), held_(n ? 1 : wide_indices ? 4 : 2) {
    for (int row = 0; row < rows; ++row) {
      starts_.push_back(static_cast<int64_t>(places_.size()));
      for (int column = 0; column < width; ++column) {
        // Of n of m some n neighbours, around the group's end.
        const bool taken = n ? (column % m + m - row % m) % m < n : random_() < density * random_.max();
        if (!taken) continue;
        places_.push_back({row, column});
        held_.push_back(n ? column % m : column);
      }
    }
    starts_.push_back(static_cast<int64_t>(places_.size()));
  }

  std::string text() const {
    return std::to_string(rows) + " x " + std::to_string(width) + " by " + std::to_string(tokens) + " tokens in " +
           std::to_string(parts) + ", " + std::to_string(places_.size()) +
           (n ? " of " + std::to_string(n) + " : " + std::to_string(m) : wide_indices ? " entries, wide" : " entries");
  }
  const std::vector<T>& dy() const { return dy_.values; }
  const std::vector<T>& x() const { return x_.values; }
  const std::vector<uint8_t>& starts() const { return starts_.bytes(); }
  const std::vector<uint8_t>& held() const { return held_.bytes(); }
  size_t partials() const { return places_.size() * parts; }
  size_t begins() const { return static_cast<size_t>(rows) * (chunks() + 1); }

  sparse_gathered::Arguments arguments(const T* dy, const T* x, const uint8_t* starts, const uint8_t* held,
                                       const int32_t* begins, float* partials) const {
    const sparse_gathered::Entries entries{n ? nullptr : starts, wide_indices, held, held_.size(), begins, n,
                                           m,                    rows,         width, chunks()};
    return {dy,     dy_.pitch, x,     x_.pitch, entries, partials, static_cast<int64_t>(places_.size()),
            tokens, parts,     part()};
  }

  std::string complaint(const std::vector<float>& partials) const {
    for (int p = 0; p < parts; ++p) {
      for (size_t i = 0; i < places_.size(); ++i) {
        const auto [row, column] = places_[i];
        double sum = 0.0, size = 0.0;
        for (int token = p * part(); token < std::min(tokens, (p + 1) * part()); ++token) {
          const double term = selftest::wide(dy_.at(token, row)) * selftest::wide(x_.at(token, column));
          sum += term, size += std::abs(term);
        }
        const float found = partials[p * places_.size() + i];
        if (std::abs(found - sum) <= (part() + 2) * 0x1p-24 * size) continue;  // not for NaN
        return "expected " + std::to_string(sum) + " at (" + std::to_string(row) + ", " + std::to_string(column) +
               "), got " + std::to_string(found);
      }
    }
    return "";
  }

 private:
  int part() const { return part_of(tokens, parts, 64); }
  int chunks() const { return tiles_of(width, sparse_gathered::kChunkColumns); }

  std::mt19937 random_;
  const Matrix<T> dy_, x_;
  Integers starts_, held_;
  std::vector<std::pair<int, int>> places_;
};

// One entry, sizes off the tile, several tiles each way, parts that end within a stage, groups that chunks cut apart, every
// entry, rows without one.
template <typename T>
std::vector<GatheredProblem<T>> gathereds() {
  return {
      {1, 1, 1, 1, 1.0, 0, 0, false},     {70, 130, 200, 1, 0.01, 0, 0, false}, {300, 300, 520, 2, 0.05, 0, 0, true},
      {200, 71, 264, 1, 1.0, 0, 0, false}, {130, 140, 96, 2, 0.0, 2, 4, false},  {65, 40, 330, 1, 0.0, 3, 11, false},
  };
}

// --- split_reduce ---------------------------------------------------------------------------------------------

template <typename Out>
struct Reduction {
  int partials, rows, rank;
  bool scaled;
  std::vector<float> values, row_scale;

  Reduction(int partials, int rows, int rank, bool scaled)
      : partials(partials), rows(rows), rank(rank), scaled(scaled), row_scale(rows) {
    std::mt19937 random(partials);
    std::normal_distribution<float> normal;
    values.resize(static_cast<size_t>(partials) * stride());
    for (float& value : values) value = normal(random);
    for (float& scale : row_scale) scale = normal(random);
  }

  int64_t numel() const { return static_cast<int64_t>(rows) * rank; }
  int64_t stride() const { return (numel() + 3) / 4 * 4; }  // every partial on 16 bytes
  reduction::Arguments arguments(const float* on_values, const float* on_scale, Out* out) const {
    return {on_values, stride(), partials, scaled ? on_scale : nullptr, 0.5f, numel(), rank, out};
  }
  // In float32 and in ascending order: the same bits.
  std::string complaint(const std::vector<Out>& out) const {
    for (int64_t i = 0; i < numel(); ++i) {
      float sum = 0.0f;
      for (int p = 0; p < partials; ++p) sum += values[p * stride() + i];
      const Out wanted = static_cast<Out>(sum * (scaled ? 0.5f * row_scale[i / rank] : 0.5f));
      if (std::memcmp(&wanted, &out[i], sizeof(Out)) != 0) return "other bits at " + std::to_string(i);
    }
    return "";
  }
};

template <typename Out>
std::vector<Reduction<Out>> reductions() {
  return {{1, 1, 1, false}, {5, 33, 6, true}, {3, 130, 16, false}, {16, 41, 3, true}};
}

}  // namespace peft_kernels::selftest
