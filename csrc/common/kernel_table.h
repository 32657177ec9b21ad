// The table of the library's kernels, for `_C.kernels()`: what each one takes of the GPU's resources.
#pragma once

namespace peft_kernels {

struct KernelResources {
  const char* name;
  int registers;      // a thread
  int shared_bytes;   // a block, static
  int dynamic_bytes;  // a block, of shared memory too: given at the launch
  int local_bytes;    // a thread: spills, and arrays that did not fit in registers
  int max_threads;    // a block, by what it takes of the registers
};

// A namespace-scope object of this type puts a kernel into the table.
struct KernelEntry {
  KernelEntry(const char* name, const void* kernel, int dynamic_bytes = 0);
};

}  // namespace peft_kernels
