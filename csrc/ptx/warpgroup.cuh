// What the warpgroups of a specialised block (four warps each) do apart from one another: named barriers (PTX ISA
// 9.7.13.1) and registers handed from one to another (setmaxnreg, PTX ISA 9.7.19.5, sm_90a).
#pragma once

#include "common/kernel_source.cuh"

namespace peft_kernels {

constexpr int kWarpgroup = 128;  // threads

// A value that is the same in all lanes of the warp, so that the compiler knows it is: wgmma's descriptors then stay in
// uniform registers.
PEFT_KERNELS_DEVICE int uniform(int value) {
#ifdef __CUDACC__
  return __shfl_sync(0xFFFFFFFF, value, 0);
#else
  return value;
#endif
}

// A barrier of `threads` threads; `name` from 1 to 15, as __syncthreads is 0.
PEFT_KERNELS_DEVICE void sync_named(int name, int threads) {
#ifdef __CUDACC__
  asm volatile("barrier.cta.sync %0, %1;\n" ::"r"(name), "r"(threads) : "memory");
#else
  emulator::sync_named(name, threads);
#endif
}

// Gives registers back, down to kRegisters a thread. By all warps of a warpgroup.
template <int kRegisters>
PEFT_KERNELS_DEVICE void dealloc_registers() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
#endif
}

// Waits for registers that others give, up to kRegisters a thread. By all warps of a warpgroup.
template <int kRegisters>
PEFT_KERNELS_DEVICE void alloc_registers() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
#endif
}

}  // namespace peft_kernels
