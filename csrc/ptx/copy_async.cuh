// cp.async (PTX ISA 9.7.9.25.3, sm_80 and later): global to shared memory without a register in between.
#pragma once

#include "common/kernel_source.cuh"

namespace peft_kernels {

// kBytes (8 or 16) to shared memory, of which `bytes` are read at `from` and the others are zeros. Both aligned to kBytes;
// with 0 bytes `from` is not read.
template <int kBytes>
PEFT_KERNELS_DEVICE void copy_async(void* to, const void* from, int bytes) {
  static_assert(kBytes == 8 || kBytes == 16);
#ifdef __CUDACC__
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {  // past the L1 cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from), "r"(bytes));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(address), "l"(from), "r"(bytes));
  }
#else
  emulator::copy_async(to, from, bytes, kBytes);
#endif
}

// Ends a group of this thread's copies; it may be empty.
PEFT_KERNELS_DEVICE void copy_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;\n");
#else
  emulator::copy_async_commit();
#endif
}

// Until all but the newest `kPending` groups of this thread have arrived. Others see them after a barrier.
template <int kPending>
PEFT_KERNELS_DEVICE void copy_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#else
  emulator::copy_async_wait(kPending);
#endif
}

}  // namespace peft_kernels
