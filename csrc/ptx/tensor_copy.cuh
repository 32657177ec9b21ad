// cp.async.bulk.tensor (PTX ISA 9.7.9.27, sm_90): boxes of a matrix between global and shared memory, by the copy engine and
// one thread. A box is 64 elements of 16 bits wide; its rows of 128 bytes lie one behind another in shared memory, swizzled
// as wgmma reads them: 16 bytes at position i of row r lie at position i ^ (r % 8). It starts on 1024 bytes.
#pragma once

#include "common/kernel_source.cuh"
#include "ptx/mbarrier.cuh"

#ifdef __CUDACC__
#include <cuda.h>  // CUtensorMap; none of the driver's functions is linked
#endif

#include <cstdint>

namespace peft_kernels {

constexpr int kBoxColumns = 64, kBoxRowBytes = 128;

#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using emulator::TensorMap;
#endif

// Byte of the 16 at `chunk` of a box's row.
PEFT_KERNELS_DEVICE int box_offset(int row, int chunk) { return row * kBoxRowBytes + (chunk ^ row % 8) * 16; }

// Starts to load the box whose first element is (row, column); zeros beyond the matrix. Its bytes complete on `loaded`. With
// `blocks`, a bit each, it arrives at the same place of all these blocks of the cluster, and completes on their barriers.
template <bool kMulticast>
PEFT_KERNELS_DEVICE void load_box(void* to, const TensorMap& map, int row, int column, Mbarrier* loaded,
                                  uint16_t blocks) {
#ifdef __CUDACC__
  if constexpr (kMulticast) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3}], [%4], %5;\n" ::"r"(shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(loaded)), "h"(blocks)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];\n" ::"r"(shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(loaded))
        : "memory");
  }
#else
  emulator::box_load(to, map, row, column, loaded, kMulticast ? blocks : 1 << emulator::cluster_rank());
#endif
}

// Fetches the map itself, ahead of its first use.
PEFT_KERNELS_DEVICE void prefetch(const TensorMap& map) {
#ifdef __CUDACC__
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
#else
  (void)map;
#endif
}

// Makes this thread's writes to shared memory visible to the copy engine: before the barrier ahead of `store_box`.
PEFT_KERNELS_DEVICE void publish_to_copies() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

// Starts to store a box at (row, column), clipped to the matrix, and ends a group of this thread's stores with it.
PEFT_KERNELS_DEVICE void store_box(const TensorMap& map, int row, int column, const void* from) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];\n"
      "cp.async.bulk.commit_group;\n" ::"l"(&map),
      "r"(column), "r"(row), "r"(shared_address(from))
      : "memory");
#else
  emulator::box_store(map, row, column, from);
#endif
}

// Until all but this thread's newest kPending stores have read shared memory.
template <int kPending>
PEFT_KERNELS_DEVICE void stores_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(kPending) : "memory");
#else
  emulator::stores_wait(kPending);
#endif
}

}  // namespace peft_kernels
