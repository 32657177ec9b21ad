// What a launch came to: a status of the runtime or, where the driver was called itself, the driver's result and words.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace peft_kernels {

class [[nodiscard]] Status {
 public:
  Status(cudaError_t runtime) : code_(runtime) {}  // implicit: most calls are the runtime's
  // Of the driver; `name` and `text` live as long as the process.
  Status(const char* call, const char* name, int code, const char* text)
      : call_(call), name_(name ? name : "unknown"), text_(text ? text : "not known to this driver"), code_(code) {}

  bool ok() const { return code_ == 0; }
  std::string text() const {
    if (call_ == nullptr) return cudaGetErrorString(static_cast<cudaError_t>(code_));
    return std::string(call_) + " answers " + name_ + " (" + std::to_string(code_) + "): " + text_;
  }

 private:
  const char *call_ = nullptr, *name_ = nullptr, *text_ = nullptr;
  int code_;
};

}  // namespace peft_kernels
