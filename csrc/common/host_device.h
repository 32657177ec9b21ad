// Arithmetic that a kernel and its host build share, so that it is proved without a GPU.
#pragma once

#ifdef __CUDACC__
#define PEFT_KERNELS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PEFT_KERNELS_HOST_DEVICE inline
#endif
