// Two grids of a stream at a time (griddepcontrol, PTX ISA 9.7.13.13, sm_90): the blocks of a grid that was launched "beside the
// one before" (launch_shared.cuh) start on SMs that the other needs no more. They may read nothing that it writes, and write
// nothing that it reads.
#pragma once

#include "common/kernel_source.h"

namespace peft_kernels {

// Once every block has said so, or ended, the next grid may start if it was launched so; any other waits as always.
PEFT_KERNELS_DEVICE void let_next_grid_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Until the grid before has ended, and what it wrote is there; at once in a grid that was launched as always. In one that was
// not, a block at least has to wait: then the grid ends after the one before it, and whatever follows finds both done.
PEFT_KERNELS_DEVICE void wait_for_previous_grid() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

}  // namespace peft_kernels
