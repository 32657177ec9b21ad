// wgmma (PTX ISA 9.7.15, sm_90a): a warpgroup's product of two matrices in shared memory, asynchronous.
#pragma once

#include "common/kernel_source.cuh"
#include "ptx/mbarrier.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace peft_kernels {

// Where an operand lies (PTX ISA 9.7.15.5.1.2): boxes of 128 bytes a row, swizzled as `tensor_copy.cuh` has them. An operand by
// feature has 16 of K side by side in a row, and 8 features every 1024 bytes; by K it has 64 features side by side in
// a row, the next 64 `group_bytes` on, and 8 of K every 1024 bytes. A descriptor counts in 16 bytes, and so can be moved
// by adding to it.
template <bool kByFeature>
PEFT_KERNELS_DEVICE uint64_t operand_at(const void* start, int group_bytes) {
  const uint64_t address = (shared_address(start) & 0x3FFFF) >> 4;
  const uint64_t leading = kByFeature ? 1 : group_bytes >> 4;  // by feature it is not read
  constexpr uint64_t kStride = 1024 >> 4, kSwizzled128 = 1;
  return address | leading << 16 | kStride << 32 | kSwizzled128 << 62;
}

// What to add for the next 16 of K.
template <bool kByFeature>
constexpr uint64_t kOperandStep = kByFeature ? 16 * 2 >> 4 : 16 * 128 >> 4;

// Keeps what sets and reads accumulators on its side of this: the compiler does not see that products under way write them.
template <int kSums>
PEFT_KERNELS_DEVICE void pin(float (&sums)[kSums]) {
#ifdef __CUDACC__
  PEFT_KERNELS_UNROLL
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(sums[i])::"memory");
#else
  (void)sums;
#endif
}

// Before the first product, and after other instructions have touched accumulators: those of the products that follow.
template <int... kSums>
PEFT_KERNELS_DEVICE void wgmma_fence(float (&... sums)[kSums]) {
  (pin(sums), ...);
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
template <int kPending, int... kSums>
PEFT_KERNELS_DEVICE void wgmma_wait(float (&... sums)[kSums]) {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
#else
  emulator::wgmma_wait(kPending);
#endif
  if constexpr (kPending == 0) (pin(sums), ...);
}

#ifdef __CUDACC__
// clang-format off
#define PEFT_KERNELS_8(i)                                                                                \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define PEFT_KERNELS_16(i) PEFT_KERNELS_8(i), PEFT_KERNELS_8(i + 8)
#define PEFT_KERNELS_32(i) PEFT_KERNELS_16(i), PEFT_KERNELS_16(i + 16)
#define PEFT_KERNELS_64(i) PEFT_KERNELS_32(i), PEFT_KERNELS_32(i + 32)
#define PEFT_KERNELS_128(i) PEFT_KERNELS_64(i), PEFT_KERNELS_64(i + 64)
#define PEFT_KERNELS_D8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PEFT_KERNELS_D16 PEFT_KERNELS_D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PEFT_KERNELS_D32 PEFT_KERNELS_D16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PEFT_KERNELS_D64 PEFT_KERNELS_D32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PEFT_KERNELS_D128 PEFT_KERNELS_D64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// kSums of d are the operands %0 to %(kSums - 1); those behind them are numbered by hand.
#define PEFT_KERNELS_WGMMA(type, columns, sums, a_at, b_at, onto_at, a_way, b_way)                         \
  asm volatile("{\n.reg .pred onto;\nsetp.ne.b32 onto, " onto_at ", 0;\n"                                  \
      "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" PEFT_KERNELS_D##sums "}, "  \
      a_at ", " b_at ", onto, 1, 1, " a_way ", " b_way ";\n}\n"                                            \
      : PEFT_KERNELS_##sums(0)                                                                             \
      : "l"(a), "l"(b), "r"(static_cast<int>(onto)), "n"(!kAByFeature), "n"(!kBByFeature))
#define PEFT_KERNELS_WGMMA_OF(type)                                                                             \
  if constexpr (kSums == 8) PEFT_KERNELS_WGMMA(type, "16", 8, "%8", "%9", "%10", "%11", "%12");                  \
  if constexpr (kSums == 16) PEFT_KERNELS_WGMMA(type, "32", 16, "%16", "%17", "%18", "%19", "%20");              \
  if constexpr (kSums == 32) PEFT_KERNELS_WGMMA(type, "64", 32, "%32", "%33", "%34", "%35", "%36");              \
  if constexpr (kSums == 64) PEFT_KERNELS_WGMMA(type, "128", 64, "%64", "%65", "%66", "%67", "%68");             \
  if constexpr (kSums == 128) PEFT_KERNELS_WGMMA(type, "256", 128, "%128", "%129", "%130", "%131", "%132")
#define PEFT_KERNELS_WGMMA_OF_REGISTERS(type)                                                               \
  asm volatile("{\n.reg .pred onto;\nsetp.ne.b32 onto, %133, 0;\n"                                          \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" PEFT_KERNELS_D128 "}, "             \
      "{%128, %129, %130, %131}, %132, onto, 1, 1, %134;\n}\n"                                             \
      : PEFT_KERNELS_128(0)                                                                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(onto)), "n"(!kBByFeature))
// clang-format on
#endif

// d = a·b, or d + a·b if `onto`: a of [64, 16], b of [16, kColumns], d in float32. Of d thread t of the warpgroup holds, with
// row = 16·(t / 32) + t % 32 / 4 and column = 8·j + 2·(t % 4), at 4·j: (row, column) and its right neighbour, (row + 8, column)
// and its right neighbour.
template <typename T, bool kAByFeature, bool kBByFeature, int kSums>
PEFT_KERNELS_DEVICE void wgmma(float (&d)[kSums], uint64_t a, uint64_t b, bool onto) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  static_assert(kSums == 8 || kSums == 16 || kSums == 32 || kSums == 64 || kSums == 128);
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, __half>) {
    PEFT_KERNELS_WGMMA_OF("f16");
  } else {
    PEFT_KERNELS_WGMMA_OF("bf16");
  }
#else
  emulator::wgmma({d, kSums, a, b, onto, kAByFeature, kBByFeature, &emulator::wide<T>, {}});
#endif
}

// The same of an a in registers: of a, thread t holds two neighbours in each, of the row and of row + 8 at k = 2·(t % 4), and
// of both at k = 2·(t % 4) + 8. Sums of two times eight columns, rounded pair by pair, are such an a of K 16.
template <typename T, bool kBByFeature>
PEFT_KERNELS_DEVICE void wgmma(float (&d)[128], const uint32_t (&a)[4], uint64_t b, bool onto) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, __half>) {
    PEFT_KERNELS_WGMMA_OF_REGISTERS("f16");
  } else {
    PEFT_KERNELS_WGMMA_OF_REGISTERS("bf16");
  }
#else
  emulator::wgmma({d, 128, 0, b, onto, true, kBByFeature, &emulator::wide<T>, emulator::gather<T>(a)});
#endif
}

#ifdef __CUDACC__
#undef PEFT_KERNELS_WGMMA_OF_REGISTERS
#undef PEFT_KERNELS_WGMMA_OF
#undef PEFT_KERNELS_WGMMA
#undef PEFT_KERNELS_D128
#undef PEFT_KERNELS_D64
#undef PEFT_KERNELS_D32
#undef PEFT_KERNELS_D16
#undef PEFT_KERNELS_D8
#undef PEFT_KERNELS_128
#undef PEFT_KERNELS_64
#undef PEFT_KERNELS_32
#undef PEFT_KERNELS_16
#undef PEFT_KERNELS_8
#endif

}  // namespace peft_kernels
