// Launches in a fresh thread, which has no context of CUDA: the first op of a worker, or the first node of a backward on a
// thread of autograd's. The host's code by a runtime and a driver of stubs; no GPU, and no kernel runs.

#include "ops/lora_linear/forward_sm90_launch.h"
#include "ops/lora_linear/gemm_sm90_launch.h"
#include "selftest/report.h"
#include "selftest/stub_runtime.h"
#include "ops/sparse_delta/gathered_launch.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

namespace peft_kernels::selftest {
namespace {

using T = __nv_bfloat16;
constexpr int kSize = 256, kRank = 8, kProcessors = 132;
alignas(16) T memory[8];  // an address: nothing is read

Status forward() {
  const lora_forward::Operand wide{memory, kSize};
  const lora_forward::Arguments args{wide,   wide,   wide,  {memory, kRank}, nullptr, nullptr, 1.0f,
                                     memory, memory, kSize, kSize,           kSize,   kRank};
  return lora_forward::launch_ranks<T, 16>(args, kProcessors, nullptr);
}

Status dx() {
  lora_gemm::Arguments args{};
  args.base[0] = {memory, kSize, memory, kSize, kSize};
  args.low[0] = {memory, kRank, memory, kSize, kRank};
  args.pairs = 1, args.out = memory, args.rows = args.columns = kSize, args.parts = 1, args.part = kSize / 64;
  return lora_gemm::launch_sm90<T, BoxWide, false>(args, kProcessors, nullptr);
}

Status n_of_m() {
  sparse_gathered::Arguments args{};
  args.dy = args.x = memory, args.dy_pitch = args.x_pitch = kSize, args.tokens = kSize;
  args.entries.columns = memory, args.entries.column_bytes = 1, args.entries.n = 2, args.entries.m = 4;
  args.entries.rows = args.entries.width = kSize, args.entries.chunks = kSize / sparse_gathered::kChunkColumns;
  args.parts = 1, args.part = kSize;
  return sparse_gathered::launch_sm90<T, BoxSquare>(args, kProcessors, nullptr);
}

struct Launched {
  std::string text;  // of what went wrong
  std::vector<std::string> calls;

  int count(const char* name) const { return static_cast<int>(std::count(calls.begin(), calls.end(), name)); }
};

// `launch` as often as `times`, in a thread of its own.
Launched in_fresh_thread(Status (*launch)(), int times = 1, stub::Answers answers = {}) {
  Launched found;
  std::thread([&] {
    stub::answers() = answers;
    for (; times > 0; --times) {
      const Status status = launch();
      if (!status.ok()) found.text = status.text();
    }
    found.calls = stub::calls();
  }).join();
  return found;
}

std::string differs(const std::string& found, const std::string& expected) {
  return found == expected ? "" : "expected \"" + expected + "\", got \"" + found + "\"";
}

void launches(const std::string& name, Status (*launch)(), int maps) {
  for (const int times : {1, 2}) {
    const Launched found = in_fresh_thread(launch, times);
    const std::string what = name + ", " + std::to_string(times) + " in a fresh thread";
    report(what, found.text);
    const auto made = [&](const char* call, int expected) {
      report(what + ": " + call, differs(std::to_string(found.count(call)), std::to_string(expected)));
    };
    made("cuTensorMapEncodeTiled", maps * times);
    made("cudaLaunchKernelExC", times);
    made("cuDevicePrimaryCtxRetain", 1);  // a thread that has a context keeps it
    made("cuCtxSetCurrent", 1);
  }
}

void errors() {
  const Launched unbound = in_fresh_thread(&forward, 1, {CUDA_ERROR_OUT_OF_MEMORY, CUDA_SUCCESS});
  report("a context that is refused",
         differs(unbound.text, "cuDevicePrimaryCtxRetain answers CUDA_ERROR_OF_THE_STUB (2): as the test asked for"));
  report("a context that is refused: maps", differs(std::to_string(unbound.count("cuTensorMapEncodeTiled")), "0"));
  const Launched unmapped = in_fresh_thread(&n_of_m, 1, {CUDA_SUCCESS, CUDA_ERROR_INVALID_CONTEXT});
  report("a map that is refused", differs(unmapped.text, "cuTensorMapEncodeTiled answers CUDA_ERROR_INVALID_CONTEXT (201): "
                                                         "invalid device context"));
  report("a map that is refused: launches", differs(std::to_string(unmapped.count("cudaLaunchKernelExC")), "0"));
}

}  // namespace
}  // namespace peft_kernels::selftest

int main() {
  using namespace peft_kernels::selftest;
  launches("the forward as one kernel", &forward, 5);
  launches("dx", &dx, 5);
  launches("the gradient of n of m", &n_of_m, 2);
  errors();
  return finish();
}
