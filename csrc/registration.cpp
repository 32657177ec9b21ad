// The schemas of the native ops, and nothing else. Implementations register themselves beside their
// kernels, those for a GPU where nvcc compiled them; the public ops, their fakes and their gradients are Python's.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(peft_kernels_native, m) {
  m.def(
      "lora_forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? row_scale, float scale, "
      "Tensor? bias) -> (Tensor, Tensor)");
  m.def(
      "lora_gemm(Tensor[] left, Tensor[] right, Tensor[] low_left, Tensor[] low_right, Tensor[] dropout_mask, "
      "Tensor? bias, bool by_feature) -> Tensor");
  m.def(
      "lora_shrink(Tensor activation, Tensor rank_factor, Tensor? seed, int threshold, int streams, Tensor(a!)? mask, "
      "bool by_feature) -> Tensor");
  m.def(
      "lora_grads(Tensor[] left, Tensor[] right, Tensor[] low_left, Tensor[] low_right, Tensor[] dropout_mask, "
      "bool by_feature, Tensor activation, Tensor rank_factor, Tensor? activation_mask, int streams) -> (Tensor, Tensor)");
  m.def(
      "lora_outer(Tensor activation, Tensor rank_factor, Tensor? lora_B, Tensor? dropout_mask, int streams, "
      "bool transposed) -> (Tensor, Tensor)");
  m.def("cuda_version() -> int");
  m.def("has_boxes(int device) -> bool");
  m.def("draw_mask(Tensor seed, int rows, int columns, int threshold, int streams) -> Tensor");
  m.def(
      "sparse_patched(Tensor weight, Tensor values, Tensor row_starts, Tensor columns, int row_begin, int row_end, "
      "int column_begin, int column_end) -> Tensor");
  m.def("sparse_gathered(Tensor dy, Tensor x, Tensor? row_starts, Tensor columns, int n, int m) -> Tensor");
  m.def("sparse_sampled(Tensor dy, Tensor x, Tensor row_starts, Tensor columns) -> Tensor");
  m.def("sparse_write(Tensor(a!) weight, Tensor base, Tensor values, Tensor row_starts, Tensor columns) -> ()");
  m.def(
      "reduce_partials(Tensor[] partials, Tensor?[] row_scale, float[] scale, ScalarType out_dtype) -> Tensor[]");
}
