// The schemas of the native ops, and nothing else. The CUDA implementations register themselves beside their
// kernels; the public ops, their fakes and their gradients are Python's.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(peft_kernels_native, m) {
  m.def("split_reduce(Tensor partials, Tensor? row_scale, float scale, ScalarType out_dtype) -> Tensor");
}
