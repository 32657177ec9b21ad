// What a matrix has to be for kernels that copy 16 bytes at a time.
#pragma once

#include "common/checks.h"

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>

namespace peft_kernels {

// The tensor that the others of an op have to fit.
inline void check_16_bit(const char* op, const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(tensor.dim() == 2, op, ": expected ", name, " of two dimensions, got ", shape_of(tensor));
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::BFloat16 || tensor.scalar_type() == ScalarType::Half, op,
                  ": expected ", name, " bfloat16 or float16, got another dtype");
}

// Below 2^31 also when they are rounded up to tiles.
inline void check_sizes(const char* op, std::initializer_list<int64_t> sizes) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 1024;
  for (const int64_t size : sizes) STD_TORCH_CHECK(size <= kMost, op, ": expected sizes of at most 2^31 - 1025, got ", size);
}

// [height, width] in the dtype and on the device of `like`, of which every row starts on 16 bytes.
inline void check_operand(const char* op, const torch::stable::Tensor& tensor, const char* name, int64_t height,
                          int64_t width, const torch::stable::Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == height && tensor.size(1) == width, op, ": expected ", name,
                  " [", height, ", ", width, "], got ", shape_of(tensor));
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": expected every operand in one dtype, got ", name,
                  " in another");
  check_same_device(tensor, name, like);
  const bool aligned = reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  STD_TORCH_CHECK(tensor.numel() == 0 || (aligned && (width == 1 || tensor.stride(1) == 1) &&
                                          (height == 1 || (tensor.stride(0) % 8 == 0 && tensor.stride(0) >= width))),
                  op, ": expected rows of ", name, " that start on 16 bytes, got strides (", tensor.stride(0), ", ",
                  tensor.stride(1), ")", aligned ? "" : " from an address that does not");
}

// [width] in the dtype and on the device of `like`, if there is one.
inline void check_bias(const char* op, const std::optional<torch::stable::Tensor>& bias, int64_t width,
                       const torch::stable::Tensor& like) {
  if (!bias) return;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == width && bias->is_contiguous() &&
                      bias->scalar_type() == like.scalar_type(),
                  op, ": expected a contiguous bias [", width, "] in the operands' dtype, got ", shape_of(*bias));
  check_same_device(*bias, "bias", like);
}

// From one row to the next; of a single row whatever.
inline int64_t pitch_of(const torch::stable::Tensor& tensor) { return tensor.size(0) > 1 ? tensor.stride(0) : 0; }

}  // namespace peft_kernels
