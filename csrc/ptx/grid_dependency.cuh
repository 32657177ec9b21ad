// Two grids of a stream at a time (griddepcontrol, PTX ISA 9.7.13.13, sm_90): the blocks of a grid that was launched "beside the
// one before" (launch_shared.h) start on SMs that the other needs no more. They may read nothing that it writes, and write
// nothing that it reads.
#pragma once

#include "common/kernel_source.cuh"

namespace peft_kernels {

// Once every block of this grid has said so, or ended, the next one may start if it was launched so; any other waits as always.
// To say so first of all costs nothing: by then every block has its SM, and the next grid gets what they leave.
PEFT_KERNELS_DEVICE void let_next_grid_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Until the grid before has ended, and what it wrote is there; at once in a grid that was launched as always. In a grid
// launched beside another at least one block has to wait: so it ends after the other, and whatever follows finds both done.
PEFT_KERNELS_DEVICE void wait_for_previous_grid() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

}  // namespace peft_kernels
