// What the self-test's problems share: operands with margins, and by how much a sum may differ.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
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

// "" where a float32 sum of so many products is right, of which `size` is the sum of the absolute values.
inline std::string differs(float found, double sum, double size, int terms) {
  if (std::abs(found - sum) <= (terms + 2) * 0x1p-24 * size) return "";  // not for NaN
  return ": expected " + std::to_string(sum) + ", got " + std::to_string(found);
}

}  // namespace peft_kernels::selftest
