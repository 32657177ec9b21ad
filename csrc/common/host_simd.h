// For loops on the host: compiled once for each of these, and the fastest that the CPU has is taken when the library is
// loaded. Bodies that such functions share have to be inlined into them.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define PEFT_KERNELS_FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PEFT_KERNELS_FOR_EACH_CPU
#endif
#define PEFT_KERNELS_INLINED inline __attribute__((always_inline))
