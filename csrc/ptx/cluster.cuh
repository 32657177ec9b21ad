// Clusters (PTX ISA 9.7.13.4, sm_90): blocks that run at once and reach each other's shared memory.
#pragma once

#include "common/kernel_source.cuh"

#include <cstdint>

namespace peft_kernels {

// This block's place in its cluster.
PEFT_KERNELS_DEVICE int cluster_rank() {
#ifdef __CUDACC__
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return emulator::cluster_rank();
#endif
}

// A barrier of all threads of the cluster, of a block alone too. Threads of a warp may come one by one.
PEFT_KERNELS_DEVICE void sync_cluster() {
#ifdef __CUDACC__
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;\n" ::
          : "memory");
#else
  emulator::sync_cluster();
#endif
}

}  // namespace peft_kernels
