// A GPU's blocks of threads on the CPU, one fibre a thread, for a kernel's own source: barriers, copies that arrive only
// when they are waited for, and the instructions of warps and warpgroups as the PTX ISA describes them. What it finds: wrong
// indices, accesses outside of shared memory, bank conflicts of `ldmatrix`, and barriers or waits that are missing, by
// running warps as far apart as barriers let them. What it cannot say: how fast; and whether a fence is missing, as it sees
// no plain load or store.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <optional>

namespace peft_kernels::emulator {

// What a launch did.
struct Report {
  int64_t bank_conflicts = 0;  // 8 x 8 matrices of ldmatrix whose rows did not lie in eight different banks of 16 bytes
};

// Runs `kernel(shared memory)` once a thread: clusters one after another, and each warp of a cluster as far as it can go,
// warps in an order that depends on `order`. Shared memory starts as NaN (bytes of 0xFF). Throws std::runtime_error at a
// deadlock, or at an access outside of shared memory.
Report launch(int blocks, int threads, size_t shared_bytes, unsigned order, const std::function<void(char*)>& kernel,
              int cluster = 1);

// --- What a kernel calls --------------------------------------------------------------------------------------

int thread_index();
int block_index();
int block_count();
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
float wide(uint16_t bits) {
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(value));
  return static_cast<float>(value);
}

template <typename T>
float element(const uint32_t* registers, int reg, int half) {
  return wide<T>(static_cast<uint16_t>(registers[reg] >> (16 * half)));
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

// --- sm_90 ----------------------------------------------------------------------------------------------------

int cluster_rank();
void sync_cluster();
void sync_named(int name, int threads);
uint32_t shared_address(const void* pointer);

void mbarrier_init(uint64_t* barrier, int expected);
void mbarrier_arrive(uint64_t* barrier, int rank, int bytes);
void mbarrier_wait(uint64_t* barrier, int parity);

// A matrix of 16-bit elements, and the height of the boxes that are copied of it.
struct TensorMap {
  char* start;
  int64_t pitch;  // in elements
  int height, width, box_height;
};

void box_load(void* to, const TensorMap& map, int row, int column, uint64_t* loaded, unsigned blocks);
void box_store(const TensorMap& map, int row, int column, const void* from);
void stores_wait(int pending);

// Two rows of an operand in registers, 16 of K.
using Rows = std::array<std::array<float, 16>, 2>;

// One thread's share of a wgmma: descriptors a and b, sums of [64, 2·count].
struct Product {
  float* sums;
  int count;
  uint64_t a, b;
  bool onto, a_by_feature, b_by_feature;
  float (*wide)(uint16_t);
  std::optional<Rows> rows;  // in place of a
};

// This thread's rows, of which four lanes hold a quarter each.
template <typename T>
Rows gather(const uint32_t (&a)[4]) {
  const Fragments* lanes = exchange({{a[0], a[1], a[2], a[3]}, {}});
  Rows rows;
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < 16; ++k) {
      rows[i][k] = element<T>(lanes[thread_index() % 32 / 4 * 4 + k % 8 / 2].a, i + 2 * (k / 8), k % 2);
    }
  }
  return rows;
}

void wgmma(const Product& product);
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace peft_kernels::emulator
