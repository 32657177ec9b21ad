// The problems of lora_gemm: operands, what comes out, and by how much it may differ.
#pragma once

#include "ops/lora_linear/gemm.h"
#include "selftest/problem.h"

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

namespace peft_kernels::selftest {

struct Shape {
  int rows, columns, K, rank;
  bool by_feature;
  int masks;  // none, one, or one a pair
  bool with_bias;
  int pairs = 1;

  // Each pair has its own, the first those above.
  int K_of(int pair) const { return K + 24 * pair; }
  int rank_of(int pair) const { return rank + 5 * pair; }
  std::string text() const {
    return std::to_string(rows) + " x " + std::to_string(columns) + " x " + std::to_string(K) + " + " +
           std::to_string(rank) + (by_feature ? ", by feature" : ", by K") + (masks ? ", masked" + std::string(masks > 1 ? " apart" : "") : "") +
           (with_bias ? ", bias" : "") + (pairs > 1 ? ", " + std::to_string(pairs) + " pairs" : "");
  }
};

// Every edge: one element, sizes off the tile, ranks of 0, 1 and past a stage, several tiles each way; masks and biases that
// start on 8 bytes, and others.
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
      if (masked) {
        found.push_back({70, 136, 130, 0, by_feature, 3, true, 3});
        found.push_back({66, 71, 40, 100, by_feature, 2, false, 2});
      }
      if (large && masked) {
        found.push_back({512, 1000, 1024, 16, by_feature, masked, true});
        found.push_back({333, 1032, 520, 130, by_feature, masked, true});
      }
    }
  }
  return found;
}

// What the tiles for sm_90a take: rows of out that start on 16 bytes, and a K. Of less than a box, several clusters of
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
      if (masked) found.push_back({140, 320, 60, 60, by_feature, 3, true, 3});
      if (masked) found.push_back({5, 72, 100, 0, by_feature, 2, false, 2});
      if (large && masked) found.push_back({1030, 1000, 1024, 16, by_feature, masked, true});
    }
  }
  return found;
}

template <typename T>
class Problem {
 public:
  // The operands of a pair.
  struct Operands {
    Matrix<T> left, right;

    Operands(const Shape& s, int K, double scale, std::mt19937& random)
        : left(s.rows, K, random, 1.0),
          right(s.by_feature ? s.columns : K, s.by_feature ? K : s.columns, random, scale) {}
    lora_gemm::Pair at(const T* on_left, const T* on_right) const {
      return {on_left, left.pitch, on_right, right.pitch, left.width};
    }
  };

  const Shape shape;
  std::mt19937 random;
  std::vector<Operands> base, low;
  // As they lie in memory: they begin at `start`, the masks so many bytes behind 16, the bias so many elements. A mask ends on
  // four bytes, as every allocation does.
  const int start;
  const Matrix<T> bias;
  std::vector<std::vector<uint8_t>> dropout_mask;

  explicit Problem(const Shape& s)
      : shape(s),
        random(s.rows * 31 + s.columns * 17 + s.K),
        start(s.rows % 7),
        bias(1, start + s.columns, random, 1.0),
        dropout_mask(s.masks, std::vector<uint8_t>((start + static_cast<size_t>(s.rows) * ((s.columns + 7) / 8) + 3) / 4 * 4)) {
    for (int pair = 0; pair < s.pairs; ++pair) {
      base.emplace_back(s, s.K_of(pair), 0.1, random);
      low.emplace_back(s, s.rank_of(pair), 0.3, random);
    }
    for (std::vector<uint8_t>& mask : dropout_mask) {
      for (uint8_t& byte : mask) byte = static_cast<uint8_t>(random());
    }
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
    for (const std::vector<uint8_t>& mask : dropout_mask) args.dropout_mask[args.masks++] = mask.data() + start;
    args.bias = shape.with_bias ? bias.values.data() + start : nullptr;
    args.out = out;
    args.rows = shape.rows, args.columns = shape.columns;
    args.partials = partials;
    args.parts = parts, args.part = slice_of(stages(), parts, 1);
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
    for (int pair = 0; pair < shape.pairs; ++pair) stages += tiles_of(shape.K_of(pair), Small::kBlockK);
    return stages;
  }

  // In float64; what may differ is float32's rounding of every sum, and one rounding to T.
  void expect() {
    constexpr double kRounding = std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
    int terms = 0;
    for (int pair = 0; pair < shape.pairs; ++pair) terms += shape.K_of(pair) + shape.rank_of(pair);
    const auto add = [this](const Operands& operands, int row, int column, double& sum, double& size) {
      const auto& [left, right] = operands;
      for (int k = 0; k < left.width; ++k) {
        const double term = wide(left.at(row, k)) * wide(shape.by_feature ? right.at(column, k) : right.at(k, column));
        sum += term, size += std::abs(term);
      }
    };
    for (int row = 0; row < shape.rows; ++row) {
      for (int column = 0; column < shape.columns; ++column) {
        double sum = 0.0, size = 0.0;
        for (int pair = 0; pair < shape.pairs; ++pair) {
          const size_t byte = start + static_cast<size_t>(row) * ((shape.columns + 7) / 8) + column / 8;
          const bool kept = !shape.masks || dropout_mask[lora_gemm::mask_of(shape.masks, pair)][byte] >> column % 8 & 1;
          if (kept) add(low[pair], row, column, sum, size);
          add(base[pair], row, column, sum, size);
        }
        if (shape.with_bias) sum += wide(bias.at(0, start + column));
        expected_.push_back(sum);
        allowed_.push_back(kRounding * std::abs(sum) + terms * 0x1p-24 * size + 0x1p-24);
      }
    }
  }
};

}  // namespace peft_kernels::selftest
