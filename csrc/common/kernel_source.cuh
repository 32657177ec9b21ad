// What a kernel's source is written in, so that it runs on a GPU and, thread by thread, on the CPU: nvcc takes CUDA's own
// words, a host compiler those of csrc/emulator, by which index arithmetic and synchronisation are proved without a GPU.
#pragma once

#ifdef __CUDACC__
#define PEFT_KERNELS_DEVICE __device__ __forceinline__
#define PEFT_KERNELS_GLOBAL(...) __global__ void __launch_bounds__(__VA_ARGS__)  // threads, and blocks an SM if need be
#define PEFT_KERNELS_UNROLL _Pragma("unroll")
#define PEFT_KERNELS_UNROLL_BY_4 _Pragma("unroll 4")
#else
#include "emulator/emulator.h"
#define PEFT_KERNELS_DEVICE inline
#define PEFT_KERNELS_GLOBAL(...) inline void
#define PEFT_KERNELS_UNROLL
#define PEFT_KERNELS_UNROLL_BY_4
#endif

namespace peft_kernels {

#ifdef __CUDACC__
PEFT_KERNELS_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
PEFT_KERNELS_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
PEFT_KERNELS_DEVICE int block_count() { return static_cast<int>(gridDim.x); }
PEFT_KERNELS_DEVICE void sync_block() { __syncthreads(); }
#else
using emulator::block_count;
using emulator::block_index;
using emulator::sync_block;
using emulator::thread_index;
#endif

}  // namespace peft_kernels
