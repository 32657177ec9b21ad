// A CUDA runtime and a driver of which nothing is there but what a launch calls: no GPU, no memory, and kernels that do not run.
// As theirs, a fresh thread has no context; the driver refuses maps without one; a launch of the runtime binds one. What is not
// named here does not link, so that a test sees every call that the host code makes.
#pragma once

#include <cuda.h>

#include <string>
#include <vector>

namespace peft_kernels::selftest::stub {

// What this thread has called, by name, in order.
std::vector<std::string>& calls();

// What cuDevicePrimaryCtxRetain and cuTensorMapEncodeTiled answer in this thread where they would succeed.
struct Answers {
  CUresult retain = CUDA_SUCCESS, encode = CUDA_SUCCESS;
};
Answers& answers();

}  // namespace peft_kernels::selftest::stub
