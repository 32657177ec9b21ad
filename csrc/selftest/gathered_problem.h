// The problems of sparse_gathered: layouts of entries and of n of m, and the gradient of their values.
#pragma once

#include "selftest/problem.h"
#include "ops/sparse_delta/gathered.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace peft_kernels::selftest {

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
        const std::string wrong = differs(partials[p * places_.size() + i], sum, size, part());
        if (!wrong.empty()) return "(" + std::to_string(row) + ", " + std::to_string(column) + ")" + wrong;
      }
    }
    return "";
  }

 private:
  int part() const { return slice_of(tokens, parts, 64); }
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

}  // namespace peft_kernels::selftest
