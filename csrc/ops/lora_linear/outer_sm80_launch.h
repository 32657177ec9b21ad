// The outer products' kernels for sm_80 and later, and their launch. No torch: the self-test launches them too.
#pragma once

#include "common/launch_shared.h"
#include "ops/lora_linear/outer_sm80.cuh"

namespace peft_kernels::lora_outer {

constexpr int kLargestWidth = 64;  // of a stream
constexpr int kLargestWidthToShrink = 32;  // above, writing and reading shrunk's parts moves more than a second pass

// Registers for as many blocks an SM as shared memory allows on sm_90: unasked the compiler spills to have one more.
template <int kWidth>
constexpr int kBlocks = kWidth <= 32 ? 3 : 2;

template <typename T, int kWidth, bool kShrinks>
PEFT_KERNELS_GLOBAL(kThreads, kBlocks<kWidth>) outer_sm80(const Arguments args) {
  extern __shared__ __align__(128) char shared[];
  Outer<T, kWidth, kShrinks>::run(args, shared);
}

// On the current device. There is at least one row, one column, and a width from 1 to kWidth. `beside`: launch_shared.h.
template <typename T, int kWidth, bool kShrinks>
cudaError_t launch_sm80(const Arguments& args, cudaStream_t stream, bool beside) {
  return launch_shared(&outer_sm80<T, kWidth, kShrinks>, blocks_of(args), kThreads,
                       Outer<T, kWidth, kShrinks>::shared_bytes(args), args, stream, 1, beside);
}

template <typename T, bool kShrinks>
cudaError_t launch_sm80(const Arguments& args, cudaStream_t stream, bool beside = false) {
  constexpr int kMost = kShrinks ? kLargestWidthToShrink : kLargestWidth;
  if (args.width <= 16) return launch_sm80<T, 16, kShrinks>(args, stream, beside);
  if (args.width <= 32) return launch_sm80<T, 32, kShrinks>(args, stream, beside);
  return launch_sm80<T, kMost, kShrinks>(args, stream, beside);
}

}  // namespace peft_kernels::lora_outer
