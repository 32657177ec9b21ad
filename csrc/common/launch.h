// Where a kernel is launched: the current stream, how many blocks, and what came of it.
#pragma once

#include "common/checks.h"
#include "common/status.h"

#include <dlfcn.h>

#include <cstdint>
#include <limits>

namespace peft_kernels {

// torch's own check of a CUDA status lives in libtorch_cuda, which this library must load without.
inline void check_cuda(const Status& status, const char* what) {
  STD_TORCH_CHECK(status.ok(), what, ": ", status.text());
}

// The getter of torch's current stream lives in libtorch_cuda. A direct reference would keep the library from
// loading beside a CPU build of torch, so it is looked up in the process, where a CUDA build has loaded it.
inline cudaStream_t current_stream(int32_t device_index) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Getter>(symbol);
  }();
  STD_TORCH_CHECK(getter != nullptr, "expected a CUDA build of torch, got one without a current CUDA stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device_index, &stream) == 0, "torch could not name the current stream of device ",
                  device_index);
  return static_cast<cudaStream_t>(stream);
}

// SMs of a device.
inline int processors_of(int32_t device_index) {
  int processors = 0;
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device_index), "counting processors");
  return processors;
}

// Whether this library and the GPU have the kernels for sm_90a: they are no other architecture's, not even a later one's.
inline bool has_boxes(int32_t device_index) {
#ifdef PEFT_KERNELS_SM90A
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_index), "asking for the capability");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_index), "asking for the capability");
  return major == 9 && minor == 0;
#else
  (void)device_index;
  return false;
#endif
}

// Blocks that cover `items` with `per_block` each: int64 in, checked against the grid's limit.
inline unsigned int blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "expected at most 2^31 - 1 blocks, got ", blocks);
  return static_cast<unsigned int>(blocks);
}

}  // namespace peft_kernels
