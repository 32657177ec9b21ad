// mma (PTX ISA 9.7.14.5.14, sm_80 and later): a warp's product of two small matrices on the tensor cores.
#pragma once

#include "common/kernel_source.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace peft_kernels {

// c += a·b of [16, 16] by [16, 8], accumulated in float32. With row = lane / 4 and column = 2·(lane % 4) a lane holds
//   a  (row, column), (row + 8, column), (row, column + 8), (row + 8, column + 8), each with its right neighbour
//   b  (column, row) and (column + 8, row), each with the one below
//   c  (row, column) and its right neighbour, then (row + 8, column) and its right neighbour
template <typename T>
PEFT_KERNELS_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b_0, uint32_t b_1) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_0), "r"(b_1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_0), "r"(b_1));
  }
#else
  emulator::mma_m16n8k16<T>(c, a, b_0, b_1);
#endif
}

}  // namespace peft_kernels
