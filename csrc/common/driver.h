// The few functions of the driver that the host calls itself. Asked of the runtime, so that the library links no libcuda and
// loads where there is no driver. No torch: the self-test calls them too.
#pragma once

#include "common/status.h"

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

namespace peft_kernels::driver {

// The function of that name as of a CUDA version, or null where the driver has none.
template <typename Function>
Function find(const char* name, unsigned version) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &result);
  const bool there = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
  return reinterpret_cast<Function>(there ? found : nullptr);
}

struct Functions {
  PFN_cuCtxGetCurrent_v4000 get_current = find<PFN_cuCtxGetCurrent_v4000>("cuCtxGetCurrent", 4000);
  PFN_cuCtxSetCurrent_v4000 set_current = find<PFN_cuCtxSetCurrent_v4000>("cuCtxSetCurrent", 4000);
  PFN_cuDeviceGet_v2000 device = find<PFN_cuDeviceGet_v2000>("cuDeviceGet", 2000);
  PFN_cuDevicePrimaryCtxRetain_v7000 retain = find<PFN_cuDevicePrimaryCtxRetain_v7000>("cuDevicePrimaryCtxRetain", 7000);
  PFN_cuGetErrorName_v6000 error_name = find<PFN_cuGetErrorName_v6000>("cuGetErrorName", 6000);
  PFN_cuGetErrorString_v6000 error_string = find<PFN_cuGetErrorString_v6000>("cuGetErrorString", 6000);
  PFN_cuTensorMapEncodeTiled_v12000 encode_tiled = find<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled", 12000);

  bool all() const {
    return get_current && set_current && device && retain && error_name && error_string && encode_tiled;
  }
};

inline const Functions& functions() {
  static const Functions found;
  return found;
}

// What `call` of the driver came to, in the driver's own words.
inline Status status_of(CUresult result, const char* call) {
  if (result == CUDA_SUCCESS) return cudaSuccess;
  const char *name = nullptr, *text = nullptr;
  functions().error_name(result, &name);
  functions().error_string(result, &text);
  return Status(call, name, static_cast<int>(result), text);
}

// Binds the current device's primary context to this thread where none is. A fresh thread has none until a call of the runtime
// that needs one binds it, and until then the driver refuses what needs one (201). Allowed while a stream is captured. The
// context is retained for good, as by the runtime that made what lies on the device.
inline Status bind_context() {
  const Functions& driver = functions();
  CUcontext context = nullptr;
  Status status = status_of(driver.get_current(&context), "cuCtxGetCurrent");
  if (!status.ok() || context != nullptr) return status;
  int ordinal = 0;
  if (const cudaError_t found = cudaGetDevice(&ordinal); found != cudaSuccess) return found;
  CUdevice device{};
  status = status_of(driver.device(&device, ordinal), "cuDeviceGet");
  if (status.ok()) status = status_of(driver.retain(&context, device), "cuDevicePrimaryCtxRetain");
  if (status.ok()) status = status_of(driver.set_current(context), "cuCtxSetCurrent");
  return status;
}

}  // namespace peft_kernels::driver
