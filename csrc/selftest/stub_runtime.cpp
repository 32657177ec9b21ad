#include "selftest/stub_runtime.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <map>

namespace peft_kernels::selftest::stub {
namespace {

const CUcontext kContext = reinterpret_cast<CUcontext>(0x1000);
thread_local CUcontext current = nullptr;

void note(const char* name) { calls().push_back(name); }

// --- The driver ---------------------------------------------------------------------------------------------------

CUresult get_current(CUcontext* context) {
  note("cuCtxGetCurrent");
  *context = current;
  return CUDA_SUCCESS;
}

CUresult set_current(CUcontext context) {
  note("cuCtxSetCurrent");
  current = context;
  return CUDA_SUCCESS;
}

CUresult device_get(CUdevice* device, int ordinal) {
  note("cuDeviceGet");
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult retain(CUcontext* context, CUdevice) {
  note("cuDevicePrimaryCtxRetain");
  *context = kContext;
  return answers().retain;
}

CUresult error_name(CUresult result, const char** name) {
  *name = result == CUDA_ERROR_INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" : "CUDA_ERROR_OF_THE_STUB";
  return CUDA_SUCCESS;
}

CUresult error_string(CUresult result, const char** text) {
  *text = result == CUDA_ERROR_INVALID_CONTEXT ? "invalid device context" : "as the test asked for";
  return CUDA_SUCCESS;
}

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                      const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  note("cuTensorMapEncodeTiled");
  if (current == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  std::memset(map, 1, sizeof(*map));
  return answers().encode;
}

}  // namespace

std::vector<std::string>& calls() {
  thread_local std::vector<std::string> made;
  return made;
}

Answers& answers() {
  thread_local Answers given;
  return given;
}

}  // namespace peft_kernels::selftest::stub

// --- The runtime ----------------------------------------------------------------------------------------------------

using namespace peft_kernels::selftest::stub;

extern "C" {

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  static const std::map<std::string, void*> there = {
      {"cuCtxGetCurrent", reinterpret_cast<void*>(&get_current)},
      {"cuCtxSetCurrent", reinterpret_cast<void*>(&set_current)},
      {"cuDeviceGet", reinterpret_cast<void*>(&device_get)},
      {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(&retain)},
      {"cuGetErrorName", reinterpret_cast<void*>(&error_name)},
      {"cuGetErrorString", reinterpret_cast<void*>(&error_string)},
      {"cuTensorMapEncodeTiled", reinterpret_cast<void*>(&encode_tiled)},
  };
  const auto at = there.find(name);
  *found = at == there.end() ? nullptr : at->second;
  *result = *found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  note("cudaGetDevice");
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  note("cudaFuncSetAttribute");
  current = kContext;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
  note("cudaLaunchKernelExC");
  current = kContext;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t) { return "an error of the runtime"; }

// What nvcc's own code calls, to register kernels and for launches in <<<>>>, of which the test makes none.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 1; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(void**, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaGetLastError() { return cudaErrorNotSupported; }

}  // extern "C"
