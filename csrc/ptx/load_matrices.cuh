// ldmatrix (PTX ISA 9.7.14.5.15, sm_75 and later): shared memory to the registers of `mma`.
#pragma once

#include "common/kernel_source.cuh"

#include <cstdint>

namespace peft_kernels {

// Four 8 x 8 matrices of 16-bit elements. Lanes 8i to 8i + 7 give the rows of matrix i, 16 bytes each. A lane is given
// of every matrix the elements 2·(lane % 4) and the next of row lane / 4; transposed, of column lane / 4.
template <bool kTransposed>
PEFT_KERNELS_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
#ifdef __CUDACC__
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address));
  }
#else
  emulator::load_matrices(out, row, kTransposed);
#endif
}

}  // namespace peft_kernels
