// A GPU's block of threads on the CPU, one fibre a thread, for a kernel's own source: barriers, copies that arrive only
// when they are waited for, and the instructions of a warp as the PTX ISA describes them. What it finds: wrong indices,
// accesses outside of shared memory, bank conflicts of `ldmatrix`, and barriers or waits that are missing, by running
// warps as far apart as barriers let them. What it cannot say: how fast.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

namespace peft_kernels::emulator {

// What a launch did.
struct Report {
  int64_t bank_conflicts = 0;  // 8 x 8 matrices of ldmatrix whose rows did not lie in eight different banks of 16 bytes
};

// Runs `kernel(shared memory)` once a thread: blocks one after another, of a block each warp as far as it can go, warps in
// an order that depends on `order`. Shared memory starts as NaN (bytes of 0xFF). Throws std::runtime_error at a deadlock or at an
// access outside of shared memory.
Report launch(int blocks, int threads, size_t shared_bytes, unsigned order, const std::function<void(char*)>& kernel);

// --- What a kernel calls --------------------------------------------------------------------------------------

int thread_index();
int block_index();
void sync_block();
void copy_async(void* to, const void* from, int bytes, int size);
void copy_async_commit();
void copy_async_wait(int pending);
void load_matrices(uint32_t (&out)[4], const void* row, bool transposed);

// The fragments that a lane brings to an mma of its warp.
struct Fragments {
  uint32_t a[4];
  uint32_t b[2];
};

// Gives this lane's fragments to the warp, and returns all 32 lanes' once the warp has arrived.
const Fragments* exchange(const Fragments& mine);

template <typename T>
float element(const uint32_t* registers, int reg, int half) {
  const uint16_t bits = static_cast<uint16_t>(registers[reg] >> (16 * half));
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(value));
  return static_cast<float>(value);
}

template <typename T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b_0, uint32_t b_1) {
  const Fragments* lanes = exchange({{a[0], a[1], a[2], a[3]}, {b_0, b_1}});
  const int lane = thread_index() % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int owner = (k % 8) / 2;  // among the four lanes of a row of a, and of a column of b
      c[i] += element<T>(lanes[4 * (row % 8) + owner].a, row / 8 + 2 * (k / 8), k % 2) *
              element<T>(lanes[4 * column + owner].b, k / 8, k % 2);
    }
  }
}

}  // namespace peft_kernels::emulator
