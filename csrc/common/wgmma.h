// wgmma (PTX ISA 9.7.15, sm_90a): a warpgroup's product of two matrices in shared memory, asynchronous.
#pragma once

#include "common/kernel_source.h"
#include "common/mbarrier.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace peft_kernels {

// Where an operand lies (PTX ISA 9.7.15.5.1.2): boxes of 128 bytes a row, swizzled as `tensor_copy.h` has them. An operand by
// feature has 16 of depth side by side in a row, and 8 features every 1024 bytes; by depth it has 64 features side by side in
// a row, the next 64 `group_bytes` on, and 8 of depth every 1024 bytes. A descriptor counts in 16 bytes, and so can be moved
// by adding to it.
template <bool kByFeature>
PEFT_KERNELS_DEVICE uint64_t operand_at(const void* start, int group_bytes) {
  const uint64_t address = (shared_address(start) & 0x3FFFF) >> 4;
  const uint64_t leading = kByFeature ? 1 : group_bytes >> 4;  // by feature it is not read
  constexpr uint64_t kStride = 1024 >> 4, kSwizzled128 = 1;
  return address | leading << 16 | kStride << 32 | kSwizzled128 << 62;
}

// What to add for the next 16 of depth.
template <bool kByFeature>
constexpr uint64_t kOperandStep = kByFeature ? 16 * 2 >> 4 : 16 * 128 >> 4;

// Before the first product, and after other instructions have touched accumulators.
PEFT_KERNELS_DEVICE void wgmma_fence() {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}

// Ends a group of products.
PEFT_KERNELS_DEVICE void wgmma_commit() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#else
  emulator::wgmma_commit();
#endif
}

// Until all but the newest kPending groups are done: they have read their operands. Where none is left, `sums` hold their
// sums, and what reads them stays behind this.
template <int kPending, int kSums>
PEFT_KERNELS_DEVICE void wgmma_wait(float (&sums)[kSums]) {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
  if constexpr (kPending == 0) {
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(sums[i])::"memory");
  }
#else
  (void)sums;
  emulator::wgmma_wait(kPending);
#endif
}

#ifdef __CUDACC__
// clang-format off
#define PEFT_KERNELS_8(d, i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
  "+f"(d[i + 6]), "+f"(d[i + 7])
#define PEFT_KERNELS_64(d, i)                                                                     \
  PEFT_KERNELS_8(d, i), PEFT_KERNELS_8(d, i + 8), PEFT_KERNELS_8(d, i + 16), PEFT_KERNELS_8(d, i + 24), \
  PEFT_KERNELS_8(d, i + 32), PEFT_KERNELS_8(d, i + 40), PEFT_KERNELS_8(d, i + 48), PEFT_KERNELS_8(d, i + 56)

#define PEFT_KERNELS_WGMMA_128(type)                                                  \
  asm volatile("{\n.reg .pred onto;\nsetp.ne.b32 onto, %66, 0;\n"                     \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {"               \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "\
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "\
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"  \
      "}, %64, %65, onto, 1, 1, %67, %68;\n}\n"                                       \
      : PEFT_KERNELS_64(d, 0)                                                         \
      : "l"(a), "l"(b), "r"(static_cast<int>(onto)), "n"(!kAByFeature), "n"(!kBByFeature))
#define PEFT_KERNELS_WGMMA_256(type)                                                  \
  asm volatile("{\n.reg .pred onto;\nsetp.ne.b32 onto, %130, 0;\n"                    \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {"               \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "\
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "\
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "\
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "\
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "\
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "\
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"\
      "}, %128, %129, onto, 1, 1, %131, %132;\n}\n"                                   \
      : PEFT_KERNELS_64(d, 0), PEFT_KERNELS_64(d, 64)                                 \
      : "l"(a), "l"(b), "r"(static_cast<int>(onto)), "n"(!kAByFeature), "n"(!kBByFeature))
// clang-format on
#endif

// d = a·b, or d + a·b if `onto`: a of [64, 16], b of [16, kColumns], d in float32. Of d thread t of the warpgroup holds, with
// row = 16·(t / 32) + t % 32 / 4 and column = 8·j + 2·(t % 4), at 4·j: (row, column) and its right neighbour, (row + 8, column)
// and its right neighbour.
template <typename T, bool kAByFeature, bool kBByFeature, int kSums>
PEFT_KERNELS_DEVICE void wgmma(float (&d)[kSums], uint64_t a, uint64_t b, bool onto) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  static_assert(kSums == 64 || kSums == 128);
#ifdef __CUDACC__
  if constexpr (kSums == 64 && std::is_same_v<T, __half>) PEFT_KERNELS_WGMMA_128("f16");
  if constexpr (kSums == 64 && std::is_same_v<T, __nv_bfloat16>) PEFT_KERNELS_WGMMA_128("bf16");
  if constexpr (kSums == 128 && std::is_same_v<T, __half>) PEFT_KERNELS_WGMMA_256("f16");
  if constexpr (kSums == 128 && std::is_same_v<T, __nv_bfloat16>) PEFT_KERNELS_WGMMA_256("bf16");
#else
  emulator::wgmma({d, kSums, a, b, onto, kAByFeature, kBByFeature, &emulator::wide<T>});
#endif
}

#ifdef __CUDACC__
#undef PEFT_KERNELS_WGMMA_256
#undef PEFT_KERNELS_WGMMA_128
#undef PEFT_KERNELS_64
#undef PEFT_KERNELS_8
#endif

}  // namespace peft_kernels
