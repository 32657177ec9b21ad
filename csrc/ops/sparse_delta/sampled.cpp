// values[i] = sum over m of dy[m, row_i] * x[m, column_i], in float32: the gradient of entries on the host, one dot
// product each (SDDMM). Tokens come in blocks: of x a block is transposed once, of dy 16 columns at a time by the thread
// that owns their rows of W. Each sum has one owner and one order: the same bits every time.

#include "common/host_simd.h"
#include "ops/sparse_delta/entries.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

namespace peft_kernels::sparse_delta {
namespace {

constexpr int64_t kTokens = 128;  // of a block
constexpr int64_t kStrip = 16;    // columns that are transposed together: a cache line of float32
constexpr int64_t kLanes = 16;    // partial sums of a dot product

// [tokens, width] of a matrix as float32 [width, kTokens]; zeros behind the last token, up to whole lanes.
template <typename T>
PEFT_KERNELS_INLINED void transpose_strip(const T* source, int64_t stride, int64_t tokens, int64_t width,
                                          float* target) {
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t column = 0; column < width; ++column) {
      target[column * kTokens + token] = static_cast<float>(source[token * stride + column]);
    }
  }
  const int64_t padded = (tokens + kLanes - 1) / kLanes * kLanes;
  for (int64_t column = 0; column < width; ++column) {
    std::fill(target + column * kTokens + tokens, target + column * kTokens + padded, 0.0f);
  }
}

// Partial sums in a register, or in as many as a CPU needs for them.
using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));

PEFT_KERNELS_INLINED void add_product(Lanes& sum, const float* left, const float* right) {
  Lanes one, other;
  std::memcpy(&one, left, sizeof(one));
  std::memcpy(&other, right, sizeof(other));
  sum += one * other;
}

// By halves: a tree of fixed shape.
template <int64_t kWidth>
PEFT_KERNELS_INLINED float sum_of(const float* lanes) {
  if constexpr (kWidth == 1) {
    return lanes[0];
  } else {
    float halves[kWidth / 2];
    for (int64_t lane = 0; lane < kWidth / 2; ++lane) halves[lane] = lanes[lane] + lanes[lane + kWidth / 2];
    return sum_of<kWidth / 2>(halves);
  }
}

PEFT_KERNELS_INLINED float sum_of(const Lanes& lanes) {
  float sums[kLanes];
  std::memcpy(sums, &lanes, sizeof(sums));
  return sum_of<kLanes>(sums);
}

// One value's dot product.
template <typename Column>
PEFT_KERNELS_INLINED void add_dot(const float* dy, const float* x, int64_t padded, const Column* column, float* value) {
  const float* source = x + *column * kTokens;
  Lanes sum = {};
  for (int64_t first = 0; first < padded; first += kLanes) add_product(sum, dy + first, source + first);
  *value += sum_of(sum);
}

// Those of four neighbours in a row: they share the loads of dy, and their chains of additions take turns.
template <typename Column>
PEFT_KERNELS_INLINED void add_four_dots(const float* dy, const float* x, int64_t padded, const Column* columns,
                                        float* values) {
  const float *source_0 = x + columns[0] * kTokens, *source_1 = x + columns[1] * kTokens,
              *source_2 = x + columns[2] * kTokens, *source_3 = x + columns[3] * kTokens;
  Lanes sum_0 = {}, sum_1 = {}, sum_2 = {}, sum_3 = {};
  for (int64_t first = 0; first < padded; first += kLanes) {
    add_product(sum_0, dy + first, source_0 + first);
    add_product(sum_1, dy + first, source_1 + first);
    add_product(sum_2, dy + first, source_2 + first);
    add_product(sum_3, dy + first, source_3 + first);
  }
  values[0] += sum_of(sum_0);
  values[1] += sum_of(sum_1);
  values[2] += sum_of(sum_2);
  values[3] += sum_of(sum_3);
}

// Adds the products of a block to the values of `rows` rows; `starts` is where the first of them begins.
template <typename Column>
PEFT_KERNELS_INLINED void add_block(const float* dy, const float* x, int64_t padded, const int64_t* starts,
                                    int64_t rows, const Column* columns, float* values) {
  for (int64_t row = 0; row < rows; ++row, dy += kTokens) {
    int64_t entry = starts[row];
    for (; entry + 4 <= starts[row + 1]; entry += 4) add_four_dots(dy, x, padded, columns + entry, values + entry);
    for (; entry < starts[row + 1]; ++entry) add_dot(dy, x, padded, columns + entry, values + entry);
  }
}

#define TRANSPOSE_OF(Type)                                                                                        \
  PEFT_KERNELS_FOR_EACH_CPU void transpose(const Type* source, int64_t stride, int64_t tokens, int64_t width,     \
                                           float* target) {                                                       \
    transpose_strip(source, stride, tokens, width, target);                                                       \
  }
TRANSPOSE_OF(float)
TRANSPOSE_OF(c10::BFloat16)
TRANSPOSE_OF(c10::Half)
#undef TRANSPOSE_OF

#define ADD_BLOCK_OF(Column)                                                                                      \
  PEFT_KERNELS_FOR_EACH_CPU void add(const float* dy, const float* x, int64_t padded, const int64_t* starts,      \
                                     int64_t rows, const Column* columns, float* values) {                        \
    add_block(dy, x, padded, starts, rows, columns, values);                                                      \
  }
ADD_BLOCK_OF(int16_t)
ADD_BLOCK_OF(int32_t)
#undef ADD_BLOCK_OF

void check_rows(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && (tensor.size(0) == 0 || tensor.size(1) <= 1 || tensor.stride(1) == 1),
                  "expected ", name, " [M, ...] with neighbours in memory, got ", shape_of(tensor));
}

Tensor sampled(const Tensor& dy, const Tensor& x, const Tensor& row_starts, const Tensor& columns) {
  check_rows(dy, "dy");
  check_rows(x, "x");
  STD_TORCH_CHECK(x.size(0) == dy.size(0) && x.scalar_type() == dy.scalar_type(),
                  "expected dy and x of as many tokens and of one dtype, got ", shape_of(dy), " and ", shape_of(x));
  const int64_t M = x.size(0), K = x.size(1), N = dy.size(1);
  const Entries entries = entries_of(row_starts, columns, N);
  Tensor result = torch::stable::new_empty(x, {entries.count}, ScalarType::Float);
  float* values = static_cast<float*>(result.mutable_data_ptr());
  std::fill(values, values + entries.count, 0.0f);
  Tensor block = torch::stable::new_empty(x, {K, kTokens}, ScalarType::Float);
  float* x_block = static_cast<float*>(block.mutable_data_ptr());

  const auto strips = [](int64_t size) { return (size + kStrip - 1) / kStrip; };
  const auto run = [&](const auto* dy_data, const auto* x_data, const auto* column_data) {
    for (int64_t first = 0; first < M; first += kTokens) {
      const int64_t tokens = std::min(kTokens, M - first), padded = (tokens + kLanes - 1) / kLanes * kLanes;
      torch::stable::parallel_for(0, strips(K), 8, [&](int64_t begin, int64_t end) {
        for (int64_t column = begin * kStrip; column < std::min(K, end * kStrip); column += kStrip) {
          transpose(x_data + first * x.stride(0) + column, x.stride(0), tokens, std::min(kStrip, K - column),
                    x_block + column * kTokens);
        }
      });
      torch::stable::parallel_for(0, strips(N), 4, [&](int64_t begin, int64_t end) {
        alignas(64) float dy_strip[kStrip * kTokens];
        for (int64_t row = begin * kStrip; row < std::min(N, end * kStrip); row += kStrip) {
          const int64_t rows = std::min(kStrip, N - row);
          transpose(dy_data + first * dy.stride(0) + row, dy.stride(0), tokens, rows, dy_strip);
          add(dy_strip, x_block, padded, entries.row_starts + row, rows, column_data, values);
        }
      });
    }
  };
  with_type_of(x, "x", [&](auto type) {
    using T = decltype(type);
    with_columns(entries, [&](const auto* column_data) {
      run(static_cast<const T*>(dy.const_data_ptr()), static_cast<const T*>(x.const_data_ptr()), column_data);
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_native, CPU, m) { m.impl("sparse_sampled", TORCH_BOX(&sampled)); }

}  // namespace peft_kernels::sparse_delta
