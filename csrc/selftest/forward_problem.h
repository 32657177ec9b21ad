// The problems of lora_forward: operands, what comes out, and by how much it may differ.
#pragma once

#include "ops/lora_linear/forward.h"
#include "selftest/problem.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

namespace peft_kernels::selftest {

template <typename T>
class ForwardProblem {
 public:
  const int rows, columns, K, rank;
  const bool with_bias, scaled_by_row;

  ForwardProblem(int rows, int columns, int K, int rank, bool with_bias, bool scaled_by_row)
      : rows(rows), columns(columns), K(K), rank(rank), with_bias(with_bias), scaled_by_row(scaled_by_row),
        random_(rows * 31 + columns * 17 + K + rank), x_(rows, K, random_, 1.0),
        weight_(columns, K, random_, 0.1), lora_A_(rank, K, random_, 0.1), lora_B_(columns, rank, random_, 0.3),
        bias_(1, kBiasStart + columns, random_, 1.0) {
    std::normal_distribution<float> normal;
    for (int row = 0; row < rows; ++row) row_scale_.push_back(normal(random_));
    x_.values[0] = T(std::numeric_limits<float>::infinity());  // is not to reach what lies behind the last rank
  }

  std::string text() const {
    return std::to_string(rows) + " x " + std::to_string(columns) + " x " + std::to_string(K) + " + " +
           std::to_string(rank) + (with_bias ? ", bias" : "") + (scaled_by_row ? ", a scale a row" : "");
  }

  int s_width() const { return (rank + 7) / 8 * 8; }
  size_t y_size() const { return static_cast<size_t>(rows) * columns; }
  size_t s_size() const { return static_cast<size_t>(rows) * s_width(); }

  const std::vector<T>& x() const { return x_.values; }
  const std::vector<T>& weight() const { return weight_.values; }
  const std::vector<T>& lora_A() const { return lora_A_.values; }
  const std::vector<T>& lora_B() const { return lora_B_.values; }
  const std::vector<T>& bias() const { return bias_.values; }
  const std::vector<float>& row_scale() const { return row_scale_; }

  lora_forward::Arguments arguments(const T* x, const T* weight, const T* lora_A, const T* lora_B, const T* bias,
                                    const float* row_scale, T* y, T* s) const {
    return {{x, x_.pitch}, {weight, weight_.pitch}, {lora_A, lora_A_.pitch}, {lora_B, lora_B_.pitch},
            with_bias ? bias + kBiasStart : nullptr, scaled_by_row ? row_scale : nullptr, kScale, y, s, rows, columns, K, rank};
  }

  // "" where both are right: S but for float32's rounding of its sums and one rounding to T, y by the S that was found.
  std::string complaint(const std::vector<T>& y, const std::vector<T>& s) const {
    for (int row = 0; row < rows; ++row) {
      const T* found = s.data() + static_cast<size_t>(row) * s_width();
      for (int k = 0; k < s_width(); ++k) {
        double sum = 0.0, size = 0.0;
        if (k < rank) add(x_, row, lora_A_, k, sum, size);
        const double factor = static_cast<double>(kScale) * (scaled_by_row ? row_scale_[row] : 1.0f);
        const std::string off = compare(wide(found[k]), factor * sum, std::abs(factor) * size, K);
        if (!off.empty()) return "S at (" + std::to_string(row) + ", " + std::to_string(k) + ")" + off;
      }
      for (int column = 0; column < columns; ++column) {
        double sum = 0.0, size = 0.0;
        add(x_, row, weight_, column, sum, size);
        for (int k = 0; k < rank; ++k) {
          const double term = wide(found[k]) * wide(lora_B_.at(column, k));
          sum += term, size += std::abs(term);
        }
        if (with_bias) {
          const double bias = wide(bias_.at(0, kBiasStart + column));
          sum += bias, size += std::abs(bias);
        }
        const double at = wide(y[static_cast<size_t>(row) * columns + column]);
        const std::string off = compare(at, sum, size, K + rank);
        if (!off.empty()) return "y at (" + std::to_string(row) + ", " + std::to_string(column) + ")" + off;
      }
    }
    return "";
  }

 private:
  static constexpr float kScale = 0.75f;
  static constexpr int kBiasStart = 3;  // it may start on any element
  std::mt19937 random_;
  Matrix<T> x_, weight_, lora_A_, lora_B_, bias_;
  std::vector<float> row_scale_;

  void add(const Matrix<T>& left, int row, const Matrix<T>& right, int column, double& sum, double& size) const {
    for (int k = 0; k < left.width; ++k) {
      const double term = wide(left.at(row, k)) * wide(right.at(column, k));
      sum += term, size += std::abs(term);
    }
  }

  static std::string compare(double found, double sum, double size, int terms) {
    if (!std::isfinite(sum)) return std::isfinite(found) ? ": expected no number, got one" : "";
    constexpr double kRounding = std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
    // float16 has no smaller steps than 2^-24.
    if (std::abs(found - sum) <= kRounding * std::abs(sum) + (terms + 3) * 0x1p-24 * size + 0x1p-25) return "";
    return ": expected " + std::to_string(sum) + ", got " + std::to_string(found);
  }
};

// One element of everything; ranks of each width of the kernel, on and off it; several clusters of tiles each way, so that a
// cluster stays with its rows, goes on to others, and begins amid some; fewer and more stages than the ring has.
template <typename T>
std::vector<ForwardProblem<T>> forwards(bool large) {
  std::vector<ForwardProblem<T>> found;
  found.emplace_back(1, 8, 1, 1, true, false);
  found.emplace_back(300, 520, 72, 16, false, true);
  found.emplace_back(70, 264, 600, 6, true, true);
  found.emplace_back(600, 512, 130, 32, true, false);  // whose last tile of a row is whole
  found.emplace_back(520, 776, 64, 40, false, false);
  found.emplace_back(258, 520, 330, 64, true, true);
  if (large) found.emplace_back(1030, 1000, 1024, 16, true, true);
  return found;
}

}  // namespace peft_kernels::selftest
