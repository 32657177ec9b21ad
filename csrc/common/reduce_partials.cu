// out[m, r] = scale * row_scale[m] * sum over p of partials[p, m, r], of several partials by one launch
//
// The second half of every split reduction (split-K of the shrink, split-M of dA and dB): the blocks of a first
// kernel own a slice each and write float32 partials, this adds them in ascending p. No atomics, so the result
// has the same bits every time.

#include "common/reduce_partials.h"

#include "common/checks.h"
#include "common/kernel_table.h"
#include "common/launch.h"
#include "common/reduce_partials_kernel.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace peft_kernels {
namespace {

using namespace reduction;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const KernelEntry kEntries[] = {
    {"reduce_partials<float, 4>", reinterpret_cast<const void*>(&kernel<float, kVector>)},
    {"reduce_partials<float, 1>", reinterpret_cast<const void*>(&kernel<float, 1>)},
    {"reduce_partials<half, 4>", reinterpret_cast<const void*>(&kernel<__half, kVector>)},
    {"reduce_partials<half, 1>", reinterpret_cast<const void*>(&kernel<__half, 1>)},
    {"reduce_partials<bfloat16, 4>", reinterpret_cast<const void*>(&kernel<__nv_bfloat16, kVector>)},
    {"reduce_partials<bfloat16, 1>", reinterpret_cast<const void*>(&kernel<__nv_bfloat16, 1>)},
};

template <typename Out>
void launch(Arguments& args, bool vectorised, cudaStream_t stream) {
  int64_t threads = 0;
  for (int j = 0; j < args.count; ++j) {
    threads += vectorised ? threads_of<kVector>(args.sums[j]) : threads_of<1>(args.sums[j]);
    args.ends[j] = threads;
  }
  const unsigned int blocks = blocks_for(threads, kThreads);
  if (vectorised) {
    kernel<Out, kVector><<<blocks, kThreads, 0, stream>>>(args);
  } else {
    kernel<Out, 1><<<blocks, kThreads, 0, stream>>>(args);
  }
  check_cuda(cudaGetLastError(), "launching reduce_partials");
}

void launch(Arguments& args, bool vectorised, ScalarType out_dtype, cudaStream_t stream) {
  if (args.count == 0) return;
  if (out_dtype == ScalarType::Half) return launch<__half>(args, vectorised, stream);
  if (out_dtype == ScalarType::BFloat16) return launch<__nv_bfloat16>(args, vectorised, stream);
  launch<float>(args, vectorised, stream);
}

// Without `out`.
Sum sum_of(const Tensor& partials, const std::optional<Tensor>& row_scale, double scale, const Tensor& like) {
  STD_TORCH_CHECK(partials.dim() == 3, "expected partials [P, M, R], got ", shape_of(partials));
  STD_TORCH_CHECK(partials.scalar_type() == ScalarType::Float, "expected float32 partials, got another dtype");
  check_same_device(partials, "partials", like);
  const int64_t rows = partials.size(1), rank = partials.size(2), numel = rows * rank;
  const int64_t pitch = rows > 1 ? partials.stride(1) : rank;
  // Apart, rows are whole packs: none crosses them.
  const bool apart = pitch > rank && rank % kVector == 0;
  STD_TORCH_CHECK(numel == 0 || ((rank == 1 || partials.stride(2) == 1) && (pitch == rank || apart)),
                  "expected every partial [M, R] contiguous, or of an R of a multiple of ", kVector,
                  " with adjacent columns, got strides (", partials.stride(1), ", ", partials.stride(2), ") for shape ",
                  shape_of(partials));
  if (row_scale) {
    STD_TORCH_CHECK(row_scale->dim() == 1 && row_scale->size(0) == rows && row_scale->is_contiguous(),
                    "expected a contiguous row_scale [", rows, "], got ", shape_of(*row_scale));
    STD_TORCH_CHECK(row_scale->scalar_type() == ScalarType::Float, "expected float32 row_scale, got another dtype");
    check_same_device(*row_scale, "row_scale", partials);
  }
  return {static_cast<const float*>(partials.const_data_ptr()),
          partials.stride(0),
          partials.size(0),
          pitch,
          row_scale ? static_cast<const float*>(row_scale->const_data_ptr()) : nullptr,
          static_cast<float>(scale),
          numel,
          rank,
          nullptr};
}

// Every row of every partial that a pack begins in has to start on 16 bytes; `out` does, it is fresh.
bool is_aligned(const Sum& sum) {
  return reinterpret_cast<std::uintptr_t>(sum.partials) % (kVector * sizeof(float)) == 0 && sum.stride_p % kVector == 0 &&
         (sum.pitch == sum.rank || sum.pitch % kVector == 0);
}

std::vector<Tensor> reduce_partials_all(std::vector<Tensor> partials, std::vector<std::optional<Tensor>> row_scales,
                                     std::vector<double> scales, ScalarType out_dtype) {
  STD_TORCH_CHECK(!partials.empty() && row_scales.size() == partials.size() && scales.size() == partials.size(),
                  "expected partials, and as many row_scales and scales, got ", partials.size(), ", ",
                  row_scales.size(), " and ", scales.size());
  STD_TORCH_CHECK(
      out_dtype == ScalarType::Float || out_dtype == ScalarType::Half || out_dtype == ScalarType::BFloat16,
      "expected out_dtype float32, float16 or bfloat16, got another dtype");
  std::vector<Sum> sums;
  for (size_t j = 0; j < partials.size(); ++j) sums.push_back(sum_of(partials[j], row_scales[j], scales[j], partials[0]));

  const int32_t device = partials[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  std::vector<Tensor> outs;
  Arguments args{};
  bool vectorised = true;
  for (size_t j = 0; j < sums.size(); ++j) {
    outs.push_back(torch::stable::new_empty(partials[j], {partials[j].size(1), partials[j].size(2)}, out_dtype));
    if (sums[j].numel == 0) continue;
    sums[j].out = outs.back().mutable_data_ptr();
    vectorised = vectorised && is_aligned(sums[j]);
    args.sums[args.count++] = sums[j];
    if (args.count < kMostSums) continue;
    launch(args, vectorised, out_dtype, stream);
    args.count = 0, vectorised = true;
  }
  launch(args, vectorised, out_dtype, stream);
  return outs;
}

}  // namespace

Tensor reduce_partials(const Tensor& partials, double scale, ScalarType out_dtype) {
  return reduce_partials_all({partials}, {std::nullopt}, {scale}, out_dtype)[0];
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_native, CUDA, m) { m.impl("reduce_partials", TORCH_BOX(&reduce_partials_all)); }

}  // namespace peft_kernels
