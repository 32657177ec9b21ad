// W + D on the host, with D at entries only: a band of it in a copy, or written into W itself. Each sum is float32's and
// rounded once.

#include "ops/sparse_delta/entries.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace peft_kernels::sparse_delta {
namespace {

constexpr int64_t kRowsPerTask = 16;

void check_weight(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && (weight.size(1) <= 1 || weight.stride(1) == 1),
                  "expected a weight [N, K] with rows in memory, got ", shape_of(weight));
}

void check_values(const Tensor& values, const char* name, const Entries& entries) {
  STD_TORCH_CHECK(values.dim() == 1 && values.size(0) == entries.count && values.is_contiguous(), "expected ", name,
                  " [", entries.count, "] in one piece, got ", shape_of(values));
}

Tensor patched(const Tensor& weight, const Tensor& values, const Tensor& row_starts, const Tensor& columns,
               int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end) {
  check_weight(weight);
  STD_TORCH_CHECK(0 <= row_begin && row_begin <= row_end && row_end <= weight.size(0) && 0 <= column_begin &&
                      column_begin <= column_end && column_end <= weight.size(1),
                  "expected a band of a weight ", shape_of(weight), ", got rows ", row_begin, " to ", row_end,
                  ", columns ", column_begin, " to ", column_end);
  const Entries entries = entries_of(row_starts, columns, weight.size(0));
  check_values(values, "values", entries);
  const int64_t width = column_end - column_begin;
  Tensor result = torch::stable::new_empty(weight, {row_end - row_begin, width});

  const auto run = [&](auto* target, const auto* source, const auto* delta, const auto* column_data) {
    using T = std::remove_reference_t<decltype(*target)>;
    torch::stable::parallel_for(row_begin, row_end, kRowsPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* line = target + (row - row_begin) * width;
        std::memcpy(line, source + row * weight.stride(0) + column_begin, width * sizeof(T));
        const auto* last = column_data + entries.row_starts[row + 1];
        const auto* column = std::lower_bound(column_data + entries.row_starts[row], last, column_begin);
        for (; column < last && *column < column_end; ++column) {
          T& place = line[*column - column_begin];
          place = static_cast<T>(static_cast<float>(place) + static_cast<float>(delta[column - column_data]));
        }
      }
    });
  };
  with_type_of(weight, "weight", [&](auto weight_type) {
    with_type_of(values, "values", [&](auto value_type) {
      using T = decltype(weight_type);
      with_columns(entries, [&](const auto* column_data) {
        run(static_cast<T*>(result.mutable_data_ptr()), static_cast<const T*>(weight.const_data_ptr()),
            static_cast<const decltype(value_type)*>(values.const_data_ptr()), column_data);
      });
    });
  });
  return result;
}

void write(Tensor weight, const Tensor& base, const Tensor& values, const Tensor& row_starts, const Tensor& columns) {
  check_weight(weight);
  const Entries entries = entries_of(row_starts, columns, weight.size(0));
  check_values(base, "base", entries);
  check_values(values, "values", entries);
  STD_TORCH_CHECK(base.scalar_type() == weight.scalar_type(), "expected base in the weight's dtype, got another");
  with_type_of(weight, "weight", [&](auto weight_type) {
    with_type_of(values, "values", [&](auto value_type) {
      using T = decltype(weight_type);
      auto* target = static_cast<T*>(weight.mutable_data_ptr());
      const auto* from = static_cast<const T*>(base.const_data_ptr());
      const auto* delta = static_cast<const decltype(value_type)*>(values.const_data_ptr());
      with_columns(entries, [&](const auto* column_data) {
        torch::stable::parallel_for(0, entries.rows, 8 * kRowsPerTask, [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row) {
            T* line = target + row * weight.stride(0);
            for (int64_t entry = entries.row_starts[row]; entry < entries.row_starts[row + 1]; ++entry) {
              line[column_data[entry]] =
                  static_cast<T>(static_cast<float>(from[entry]) + static_cast<float>(delta[entry]));
            }
          }
        });
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_native, CPU, m) {
  m.impl("sparse_patched", TORCH_BOX(&patched));
  m.impl("sparse_write", TORCH_BOX(&write));
}

}  // namespace peft_kernels::sparse_delta
