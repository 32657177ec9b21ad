// Asked before a backend is chosen: whether this build has the CUDA kernels, and whose runtime they bring.

#include <torch/csrc/stable/library.h>

#include <cstdint>

#ifdef PEFT_KERNELS_CUDA
#include <cuda_runtime_api.h>
#endif

namespace peft_kernels {
namespace {

// As 13000 for 13.0; 0 where a C++ compiler alone built the library.
int64_t cuda_version() {
#ifdef PEFT_KERNELS_CUDA
  return CUDART_VERSION;
#else
  return 0;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("cuda_version", TORCH_BOX(&cuda_version));
}

}  // namespace peft_kernels
