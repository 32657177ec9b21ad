// The library's kernels of the GEMM for sm_90a.

#include "common/kernel_table.h"
#include "ops/lora_linear/gemm_sm90_launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace peft_kernels::lora_gemm {
namespace {

#define ENTRY(T, tile, by_feature)                                                                     \
  KernelEntry("gemm_sm90<" #T ", " #tile ", " #by_feature ">",                                         \
              reinterpret_cast<const void*>(&gemm_sm90<T, tile, by_feature>),                          \
              BoxGemm<T, tile, by_feature>::kSharedBytes)
#define ENTRIES(T) \
  ENTRY(T, BoxWide, true), ENTRY(T, BoxWide, false), ENTRY(T, BoxSquare, true), ENTRY(T, BoxSquare, false)
const KernelEntry kEntries[] = {ENTRIES(__nv_bfloat16), ENTRIES(__half)};
#undef ENTRIES
#undef ENTRY

}  // namespace

template Status launch_sm90<__nv_bfloat16, true>(const Arguments&, TileName, int, cudaStream_t);
template Status launch_sm90<__nv_bfloat16, false>(const Arguments&, TileName, int, cudaStream_t);
template Status launch_sm90<__half, true>(const Arguments&, TileName, int, cudaStream_t);
template Status launch_sm90<__half, false>(const Arguments&, TileName, int, cudaStream_t);

}  // namespace peft_kernels::lora_gemm
