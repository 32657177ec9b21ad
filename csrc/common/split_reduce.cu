// out[m, r] = scale * row_scale[m] * sum over p of partials[p, m, r]
//
// The second half of every split reduction (split-K of the shrink, split-M of dA and dB): the blocks of a first
// kernel own a slice each and write float32 partials, this adds them in ascending p. No atomics, so the result
// has the same bits every time.

#include "common/split_reduce.h"

#include "common/checks.h"
#include "common/kernel_table.h"
#include "common/launch.h"
#include "common/split_reduce_kernel.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>

namespace peft_kernels {
namespace {

using namespace reduction;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const KernelEntry kEntries[] = {
    {"split_reduce<float, 4>", reinterpret_cast<const void*>(&kernel<float, kVector>)},
    {"split_reduce<float, 1>", reinterpret_cast<const void*>(&kernel<float, 1>)},
    {"split_reduce<half, 4>", reinterpret_cast<const void*>(&kernel<__half, kVector>)},
    {"split_reduce<half, 1>", reinterpret_cast<const void*>(&kernel<__half, 1>)},
    {"split_reduce<bfloat16, 4>", reinterpret_cast<const void*>(&kernel<__nv_bfloat16, kVector>)},
    {"split_reduce<bfloat16, 1>", reinterpret_cast<const void*>(&kernel<__nv_bfloat16, 1>)},
};

template <typename Out>
void launch(const Arguments& args, bool vectorised, cudaStream_t stream) {
  const int64_t width = vectorised ? kVector : 1;
  const unsigned int blocks = blocks_for(args.numel / width + args.numel % width, kThreads);
  if (vectorised) {
    kernel<Out, kVector><<<blocks, kThreads, 0, stream>>>(args);
  } else {
    kernel<Out, 1><<<blocks, kThreads, 0, stream>>>(args);
  }
  check_cuda(cudaGetLastError(), "launching split_reduce");
}

}  // namespace

Tensor split_reduce(const Tensor& partials, const std::optional<Tensor>& row_scale, double scale,
                    ScalarType out_dtype) {
  STD_TORCH_CHECK(partials.dim() == 3, "expected partials [P, M, R], got ", shape_of(partials));
  STD_TORCH_CHECK(partials.scalar_type() == ScalarType::Float, "expected float32 partials, got another dtype");
  const int64_t rows = partials.size(1), rank = partials.size(2), numel = rows * rank;
  STD_TORCH_CHECK(numel == 0 || ((rank == 1 || partials.stride(2) == 1) && (rows == 1 || partials.stride(1) == rank)),
                  "expected every partial [M, R] contiguous, got strides (", partials.stride(1), ", ",
                  partials.stride(2), ") for shape ", shape_of(partials));
  if (row_scale) {
    STD_TORCH_CHECK(row_scale->dim() == 1 && row_scale->size(0) == rows && row_scale->is_contiguous(),
                    "expected a contiguous row_scale [", rows, "], got ", shape_of(*row_scale));
    STD_TORCH_CHECK(row_scale->scalar_type() == ScalarType::Float, "expected float32 row_scale, got another dtype");
    check_same_device(*row_scale, "row_scale", partials);
  }
  STD_TORCH_CHECK(
      out_dtype == ScalarType::Float || out_dtype == ScalarType::Half || out_dtype == ScalarType::BFloat16,
      "expected out_dtype float32, float16 or bfloat16, got another dtype");

  const torch::stable::accelerator::DeviceGuard guard(partials.get_device_index());
  Tensor out = torch::stable::new_empty(partials, {rows, rank}, out_dtype);
  if (numel == 0) return out;

  const Arguments args{
      static_cast<const float*>(partials.const_data_ptr()),
      partials.stride(0),
      partials.size(0),
      row_scale ? static_cast<const float*>(row_scale->const_data_ptr()) : nullptr,
      static_cast<float>(scale),
      numel,
      rank,
      out.mutable_data_ptr(),
  };
  // Every partial has to start on 16 bytes; `out` does, it is fresh.
  const bool vectorised =
      reinterpret_cast<std::uintptr_t>(args.partials) % (kVector * sizeof(float)) == 0 && args.stride_p % kVector == 0;
  const cudaStream_t stream = current_stream(partials.get_device_index());
  switch (out_dtype) {
    case ScalarType::Half:
      launch<__half>(args, vectorised, stream);
      break;
    case ScalarType::BFloat16:
      launch<__nv_bfloat16>(args, vectorised, stream);
      break;
    default:
      launch<float>(args, vectorised, stream);
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_native, CUDA, m) { m.impl("split_reduce", TORCH_BOX(&split_reduce)); }

}  // namespace peft_kernels
