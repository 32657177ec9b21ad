// What every host file checks with: STD_TORCH_CHECK for what the caller passed. Of CUDA knows launch.h.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <sstream>
#include <string>

namespace peft_kernels {

// "[2, 3]", for messages.
inline std::string shape_of(const torch::stable::Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    text << (dim ? ", " : "") << tensor.size(dim);
  }
  text << ']';
  return text.str();
}

// `name` lives on the GPU that `like` lives on.
inline void check_same_device(const torch::stable::Tensor& tensor, const char* name,
                              const torch::stable::Tensor& like) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), "expected ", name,
                  " on CUDA device ", like.get_device_index(), ", got ",
                  tensor.is_cuda() ? "CUDA device " + std::to_string(tensor.get_device_index())
                                   : std::string("a tensor that is not on CUDA"));
}

}  // namespace peft_kernels
