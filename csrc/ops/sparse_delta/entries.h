// Entries of a weight [N, K] by rows, as `SparseLayout` keeps them: where each row begins, and their columns, ascending.
#pragma once

#include "common/checks.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace peft_kernels::sparse_delta {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Entries {
  const int64_t* row_starts;  // [N + 1]
  const Tensor& columns;      // [nnz], int16 or int32
  int64_t rows;               // N
  int64_t count;              // nnz
};

// That they lie inside of the weight is what `SparseLayout` has checked.
inline Entries entries_of(const Tensor& row_starts, const Tensor& columns, int64_t rows) {
  STD_TORCH_CHECK(row_starts.dim() == 1 && row_starts.size(0) == rows + 1 && row_starts.is_contiguous() &&
                      row_starts.scalar_type() == ScalarType::Long,
                  "expected contiguous row_starts, int64 [", rows + 1, "], got ", shape_of(row_starts),
                  " or another dtype");
  const auto type = columns.scalar_type();
  STD_TORCH_CHECK(
      columns.dim() == 1 && columns.is_contiguous() && (type == ScalarType::Short || type == ScalarType::Int),
      "expected contiguous columns, int16 or int32 [nnz], got ", shape_of(columns), " or another dtype");
  const auto* starts = static_cast<const int64_t*>(row_starts.const_data_ptr());
  STD_TORCH_CHECK(starts[rows] == columns.size(0), "expected ", starts[rows], " columns, got ", columns.size(0));
  return {starts, columns, rows, columns.size(0)};
}

// Calls `function` with the columns as what they are.
template <typename Function>
void with_columns(const Entries& entries, Function&& function) {
  if (entries.columns.scalar_type() == ScalarType::Short) {
    function(static_cast<const int16_t*>(entries.columns.const_data_ptr()));
  } else {
    function(static_cast<const int32_t*>(entries.columns.const_data_ptr()));
  }
}

// Calls `function` with a value of a tensor's type: float, BFloat16 or Half.
template <typename Function>
void with_type_of(const Tensor& tensor, const char* name, Function&& function) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::BFloat16:
      return function(c10::BFloat16{});
    case ScalarType::Half:
      return function(c10::Half{});
    default:
      STD_TORCH_CHECK(false, "expected ", name, " in float32, bfloat16 or float16, got another dtype");
  }
}

}  // namespace peft_kernels::sparse_delta
