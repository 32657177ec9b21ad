#include "common/kernel_table.h"

#include <cuda_runtime_api.h>

#include <vector>

namespace peft_kernels {
namespace {

struct Known {
  const char* name;
  const void* kernel;
  int dynamic_bytes;
};

// A function's static: the entries register themselves in no fixed order.
std::vector<Known>& table() {
  static std::vector<Known> kernels;
  return kernels;
}

}  // namespace

KernelEntry::KernelEntry(const char* name, const void* kernel, int dynamic_bytes) {
  table().push_back({name, kernel, dynamic_bytes});
}

}  // namespace peft_kernels

// The one C function of the library, found by name by `_C`. Fills `out` for the kernel at `index` as the driver
// loaded it, so it needs a GPU. Returns 1 past the last kernel, 0 otherwise; `error` is null where it went well.
extern "C" __attribute__((visibility("default"))) int peft_kernels_kernel_resources(
    int index, peft_kernels::KernelResources* out, const char** error) {
  const auto& kernels = peft_kernels::table();
  if (index < 0 || index >= static_cast<int>(kernels.size())) return 1;
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, kernels[index].kernel);
  *error = status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  *out = {kernels[index].name,
          attributes.numRegs,
          static_cast<int>(attributes.sharedSizeBytes),
          kernels[index].dynamic_bytes,
          static_cast<int>(attributes.localSizeBytes),
          attributes.maxThreadsPerBlock};
  return 0;
}
