// What the emulator knows of a launch while it runs. For its own files only.
#pragma once

#include "emulator/emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace peft_kernels::emulator {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kWarp = 32;
constexpr size_t kMargin = 8192;  // behind shared memory, for stores that no one checks

// What threads wait for: that another generation comes.
struct Gate {
  int generation = 0;
};

class Barrier : public Gate {
 public:
  explicit Barrier(int threads = 0) : threads_(threads) {}
  // The generation that has to pass before this thread may go on.
  int arrive() {
    const int mine = generation;
    if (++arrived_ == threads_) arrived_ = 0, ++generation;
    return mine;
  }

 private:
  int threads_, arrived_ = 0;
};

// In shared memory, with phases for generations.
struct PhasedBarrier : Gate {
  int expected = 0, arrived = 0;
  int64_t bytes = 0;  // announced and not arrived; below 0 where they arrived first

  void pass() {
    if (arrived == expected && bytes == 0) arrived = 0, ++generation;
  }
};

struct Copy {
  char* to;
  const char* from;
  int bytes, size;  // read, and written: zeros behind
};

struct Warp {
  explicit Warp(int lanes) : barrier(lanes) {}
  Barrier barrier;
  // Two of each: a lane may bring the next while another still reads the last.
  std::array<std::array<Fragments, kWarp>, 2> fragments;
  std::array<std::array<const char*, kWarp>, 2> rows;
};

using Work = std::function<void()>;

struct Block;

struct Fibre {
  ucontext_t context;
  Block* block = nullptr;
  int index = 0, turn = 0;
  bool done = false;
  const Gate* waits_for = nullptr;
  int generation = 0;
  // Begun and not waited for, group by group: cp.async, wgmma, stores of boxes.
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copies;
  std::vector<Product> open_products;
  std::deque<std::vector<Product>> products;
  std::deque<Work> stores;
};

struct Cluster;

struct Block {
  Block(Cluster& cluster, int index, int rank, int threads, size_t shared_bytes)
      : cluster(cluster), index(index), rank(rank), shared(shared_bytes + 1024 + kMargin, static_cast<char>(0xFF)),
        barrier(threads), fibres(threads) {
    const auto address = reinterpret_cast<uintptr_t>(shared.data());
    begin = shared.data() + (1024 - address % 1024) % 1024;
    end = begin + shared_bytes;
    for (int first = 0; first < threads; first += kWarp) warps.emplace_back(std::min(kWarp, threads - first));
  }

  Cluster& cluster;
  int index, rank;  // among all, and in the cluster
  std::vector<char> shared;
  char *begin, *end;
  Barrier barrier;
  std::map<int, Barrier> named;
  std::map<int64_t, PhasedBarrier> phased;  // by offset in shared memory
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
};

// Blocks that run at once.
struct Cluster {
  Cluster(const std::function<void(char*)>& kernel, int first, int size, int all, int threads, size_t shared_bytes,
          unsigned order)
      : kernel(kernel), all(all), barrier(size * threads), late(order != 0), random(order) {
    for (int rank = 0; rank < size; ++rank) {
      blocks.push_back(std::make_unique<Block>(*this, first + rank, rank, threads, shared_bytes));
    }
  }

  const std::function<void(char*)>& kernel;
  int all;  // blocks of the launch
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
  // Either copies of boxes arrive at once, and products read their operands as late as they may, or the other way round:
  // the first shows what is overwritten too early, the second what is read too early.
  bool late;
  std::mt19937 random;
  std::vector<Work> loads;  // late ones, in no order
  Report report;
  Fibre* current = nullptr;
  ucontext_t scheduler;
  std::string error;
};

extern Cluster* running;  // one launch at a time, on one thread

inline Fibre& current() { return *running->current; }
inline Block& block() { return *running->current->block; }

// An exception cannot leave a fibre: the launch throws it, and this fibre is not run again.
[[noreturn]] void fail(const std::string& what);

// Until the gate has left `generation` behind.
void wait(const Gate& gate, int generation);
inline void wait(Barrier& barrier) { wait(barrier, barrier.arrive()); }

// All lanes of this thread's warp.
void sync_warp();

void check_shared(const void* address, int size, const char* what);

}  // namespace peft_kernels::emulator
