#include "emulator/emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace peft_kernels::emulator {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kWarp = 32;
constexpr size_t kMargin = 8192;  // behind shared memory, for stores that no one checks

struct Copy {
  char* to;
  const char* from;
  int bytes, size;  // read, and written: zeros behind
};

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  // The generation that has to pass before this thread may go on.
  int arrive() {
    const int mine = generation_;
    if (++arrived_ == threads_) arrived_ = 0, ++generation_;
    return mine;
  }
  bool open(int generation) const { return generation_ != generation; }

 private:
  int threads_, arrived_ = 0, generation_ = 0;
};

struct Warp {
  explicit Warp(int lanes) : barrier(lanes) {}
  Barrier barrier;
  // Two of each: a lane may bring the next while another still reads the last.
  std::array<std::array<Fragments, kWarp>, 2> fragments;
  std::array<std::array<const char*, kWarp>, 2> rows;
};

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  int index = 0, turn = 0;
  bool done = false;
  const Barrier* waits_for = nullptr;
  int generation = 0;
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
};

struct Block {
  Block(int index, int threads, size_t shared_bytes, const std::function<void(char*)>& kernel, Report& report)
      : index(index), shared(shared_bytes + 128 + kMargin, static_cast<char>(0xFF)), barrier(threads), kernel(kernel),
        report(report), fibres(threads) {
    const auto address = reinterpret_cast<uintptr_t>(shared.data());
    begin = shared.data() + (128 - address % 128) % 128;
    end = begin + shared_bytes;
    for (int first = 0; first < threads; first += kWarp) warps.emplace_back(std::min(kWarp, threads - first));
  }

  int index;
  std::vector<char> shared;
  char *begin, *end;
  Barrier barrier;
  const std::function<void(char*)>& kernel;
  Report& report;
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  Fibre* current = nullptr;
  ucontext_t scheduler;
  std::string error;
};

Block* running = nullptr;  // one launch at a time, on one thread

void leave() { swapcontext(&running->current->context, &running->scheduler); }

// An exception cannot leave a fibre: the launch throws it, and this fibre is not run again.
[[noreturn]] void fail(const std::string& what) {
  running->error = what + " (block " + std::to_string(running->index) + ", thread " +
                   std::to_string(running->current->index) + ")";
  for (;;) leave();
}

void wait(Barrier& barrier) {
  Fibre& fibre = *running->current;
  fibre.generation = barrier.arrive();
  fibre.waits_for = &barrier;
  while (!barrier.open(fibre.generation)) leave();
  fibre.waits_for = nullptr;
}

void check_shared(const void* address, int size, const char* what) {
  const char* at = static_cast<const char*>(address);
  if (at < running->begin || at + size > running->end) fail(std::string(what) + " outside of shared memory");
  if ((at - running->begin) % size) fail(std::string(what) + " at an address that is no multiple of its size");
}

void enter() {
  running->kernel(running->begin);
  running->current->done = true;
  leave();
}

// Until every lane waits for other warps or is done; whether any moved.
bool run_warp(Block& block, int warp) {
  const int first = warp * kWarp, last = std::min(first + kWarp, static_cast<int>(block.fibres.size()));
  bool moved = false;
  for (bool again = true; again;) {
    again = false;
    for (int index = first; index < last; ++index) {
      Fibre& fibre = block.fibres[index];
      if (fibre.done || (fibre.waits_for != nullptr && !fibre.waits_for->open(fibre.generation))) continue;
      block.current = &fibre;
      swapcontext(&block.scheduler, &fibre.context);
      if (!block.error.empty()) throw std::runtime_error(block.error);
      moved = again = true;
    }
  }
  return moved;
}

void run(Block& block, const std::vector<int>& order) {
  running = &block;
  for (size_t i = 0; i < block.fibres.size(); ++i) {
    Fibre& fibre = block.fibres[i];
    fibre.index = static_cast<int>(i);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStackBytes;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, &enter, 0);
  }
  // A warp goes as far as it can before the next one moves: the farther apart they are, the more a missing barrier shows.
  while (std::any_of(block.fibres.begin(), block.fibres.end(), [](const Fibre& fibre) { return !fibre.done; })) {
    bool moved = false;
    for (const int warp : order) moved |= run_warp(block, warp);
    if (!moved) throw std::runtime_error("a deadlock in block " + std::to_string(block.index));
  }
  if (std::any_of(block.end, block.end + kMargin, [](char byte) { return byte != static_cast<char>(0xFF); })) {
    throw std::runtime_error("written behind shared memory in block " + std::to_string(block.index));
  }
}

}  // namespace

Report launch(int blocks, int threads, size_t shared_bytes, unsigned order, const std::function<void(char*)>& kernel) {
  Report report;
  std::vector<int> warps((threads + kWarp - 1) / kWarp);
  std::iota(warps.begin(), warps.end(), 0);
  if (order) std::shuffle(warps.begin(), warps.end(), std::mt19937(order));
  for (int index = 0; index < blocks; ++index) {
    Block block(index, threads, shared_bytes, kernel, report);
    run(block, warps);
  }
  running = nullptr;
  return report;
}

int thread_index() { return running->current->index; }
int block_index() { return running->index; }
void sync_block() { wait(running->barrier); }

void copy_async(void* to, const void* from, int bytes, int size) {
  check_shared(to, size, "a copy");
  if (bytes < 0 || bytes > size) fail("a copy of " + std::to_string(bytes) + " bytes");
  if (bytes && reinterpret_cast<uintptr_t>(from) % size) fail("a copy from an address that is no multiple of its size");
  running->current->open_group.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, size});
}

void copy_async_commit() {
  Fibre& fibre = *running->current;
  fibre.groups.push_back(std::move(fibre.open_group));
  fibre.open_group.clear();
}

// As late as the ISA allows: whoever reads earlier reads what was there before.
void copy_async_wait(int pending) {
  std::deque<std::vector<Copy>>& groups = running->current->groups;
  for (; static_cast<int>(groups.size()) > pending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.to, 0, copy.size);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

void load_matrices(uint32_t (&out)[4], const void* row, bool transposed) {
  check_shared(row, 16, "ldmatrix");
  Fibre& fibre = *running->current;
  Warp& warp = running->warps[fibre.index / kWarp];
  const int lane = fibre.index % kWarp;
  std::array<const char*, kWarp>& rows = warp.rows[fibre.turn ^= 1];
  rows[lane] = static_cast<const char*>(row);
  wait(warp.barrier);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int down = transposed ? 2 * (lane % 4) + i : lane / 4, right = transposed ? lane / 4 : 2 * (lane % 4) + i;
      std::memcpy(&pair[i], rows[8 * matrix + down] + 2 * right, sizeof(uint16_t));
    }
    out[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
  if (lane == 0) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned banks = 0;
      for (int i = 0; i < 8; ++i) banks |= 1u << (rows[8 * matrix + i] - running->begin) / 16 % 8;
      running->report.bank_conflicts += banks != 0xFF;
    }
  }
}

const Fragments* exchange(const Fragments& mine) {
  Fibre& fibre = *running->current;
  Warp& warp = running->warps[fibre.index / kWarp];
  std::array<Fragments, kWarp>& lanes = warp.fragments[fibre.turn ^= 1];
  lanes[fibre.index % kWarp] = mine;
  wait(warp.barrier);
  return lanes.data();
}

}  // namespace peft_kernels::emulator
