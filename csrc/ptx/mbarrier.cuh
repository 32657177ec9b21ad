// mbarrier (PTX ISA 9.7.13.15, sm_90 for what is used here): a barrier in shared memory on which threads arrive, and on
// which copies complete. A phase ends when all arrivals of `expected` and all announced bytes have come; phases alternate
// between the parities 0 and 1, starting at 0. Waiting for parity 1 of a new barrier returns at once.
//
// At the scope of the block, the default: what crosses blocks here are copies, which the barrier's bytes order, and reads by
// wgmma that are done. At the cluster's scope an arrival is a fence of the whole GPU, and a wait empties the L1 cache.
#pragma once

#include "common/kernel_source.cuh"

#include <cstdint>

namespace peft_kernels {

using Mbarrier = uint64_t;

#ifdef __CUDACC__
PEFT_KERNELS_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#else
using emulator::shared_address;
#endif

// By one thread, before `mbarrier_publish` and a barrier of all threads that use it.
PEFT_KERNELS_DEVICE void mbarrier_init(Mbarrier* barrier, int expected) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(expected) : "memory");
#else
  emulator::mbarrier_init(barrier, expected);
#endif
}

// Makes this thread's initialisations visible to the cluster, and to copies.
PEFT_KERNELS_DEVICE void mbarrier_publish() {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
#endif
}

// Arrives once, and announces bytes that copies will bring in this phase.
PEFT_KERNELS_DEVICE void mbarrier_arrive_expecting(Mbarrier* barrier, int bytes) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
#else
  emulator::mbarrier_arrive(barrier, emulator::cluster_rank(), bytes);
#endif
}

// Arrives once on the barrier at the same place in the shared memory of block `rank` of the cluster.
PEFT_KERNELS_DEVICE void mbarrier_arrive_at(Mbarrier* barrier, int rank) {
#ifdef __CUDACC__
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#else
  emulator::mbarrier_arrive(barrier, rank, 0);
#endif
}

// Until the phase of that parity has ended.
PEFT_KERNELS_DEVICE void mbarrier_wait(Mbarrier* barrier, int parity) {
#ifdef __CUDACC__
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@ended bra done;\n"
      "bra again;\n"
      "done:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  emulator::mbarrier_wait(barrier, parity);
#endif
}

}  // namespace peft_kernels
