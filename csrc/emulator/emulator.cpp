// The launch, and the instructions of every architecture.
#include "emulator/block.h"

#include <numeric>
#include <stdexcept>
#include <utility>

namespace peft_kernels::emulator {

Cluster* running = nullptr;

namespace {

// One a fibre, kept from launch to launch: pages that are there already are what makes small launches fast.
char* stack_of(size_t fibre) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= fibre) stacks.emplace_back(new char[kStackBytes]);
  return stacks[fibre].get();
}

void leave() { swapcontext(&running->current->context, &running->scheduler); }

void enter() {
  running->kernel(block().begin);
  if (!current().stores.empty()) fail("ended before its stores had read shared memory");
  current().done = true;
  leave();
}

// Until every lane waits for other warps or is done; whether any moved.
bool run_warp(Cluster& cluster, Block& block, int warp) {
  const int first = warp * kWarp, last = std::min(first + kWarp, static_cast<int>(block.fibres.size()));
  bool moved = false;
  for (bool again = true; again;) {
    again = false;
    for (int index = first; index < last; ++index) {
      Fibre& fibre = block.fibres[index];
      if (fibre.done || (fibre.waits_for != nullptr && fibre.waits_for->generation == fibre.generation)) continue;
      cluster.current = &fibre;
      swapcontext(&cluster.scheduler, &fibre.context);
      if (!cluster.error.empty()) throw std::runtime_error(cluster.error);
      moved = again = true;
    }
  }
  return moved;
}

// One of the loads that have not arrived; whether there was any.
bool arrive_late(Cluster& cluster) {
  if (cluster.loads.empty()) return false;
  const size_t chosen = cluster.random() % cluster.loads.size();
  const Work load = std::move(cluster.loads[chosen]);
  cluster.loads.erase(cluster.loads.begin() + static_cast<std::ptrdiff_t>(chosen));
  load();
  return true;
}

void run(Cluster& cluster) {
  running = &cluster;
  const auto each = [&](auto&& of_fibre) {
    for (auto& block : cluster.blocks) {
      for (size_t i = 0; i < block->fibres.size(); ++i) of_fibre(*block, block->fibres[i], static_cast<int>(i));
    }
  };
  size_t fibres = 0;
  each([&fibres](Block& block, Fibre& fibre, int index) {
    fibre.block = &block;
    fibre.index = index;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = stack_of(fibres++);
    fibre.context.uc_stack.ss_size = kStackBytes;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, &enter, 0);
  });
  std::vector<std::pair<Block*, int>> warps;
  for (auto& block : cluster.blocks) {
    for (int warp = 0; warp < static_cast<int>(block->warps.size()); ++warp) warps.emplace_back(block.get(), warp);
  }
  if (cluster.late) std::shuffle(warps.begin(), warps.end(), cluster.random);
  // A warp goes as far as it can before the next one moves: the farther apart they are, the more a missing barrier shows.
  for (bool moved = true; moved;) {
    moved = false;
    for (const auto& [block, warp] : warps) moved |= run_warp(cluster, *block, warp);
    if (!moved) moved = arrive_late(cluster);
  }
  each([](Block& block, Fibre& fibre, int) {
    if (!fibre.done) throw std::runtime_error("a deadlock in block " + std::to_string(block.index));
  });
  for (const auto& block : cluster.blocks) {
    if (std::any_of(block->end, block->end + kMargin, [](char byte) { return byte != static_cast<char>(0xFF); })) {
      throw std::runtime_error("written behind shared memory in block " + std::to_string(block->index));
    }
  }
}

}  // namespace

Report launch(int blocks, int threads, size_t shared_bytes, unsigned order, const std::function<void(char*)>& kernel,
              int cluster) {
  Report report;
  for (int i = 0; i < blocks / cluster; ++i) {  // in either direction, as what several write must be the same
    const int first = (order % 2 ? blocks / cluster - 1 - i : i) * cluster;
    Cluster together(kernel, first, cluster, blocks, threads, shared_bytes, order);
    run(together);
    report.bank_conflicts += together.report.bank_conflicts;
  }
  running = nullptr;
  return report;
}

void fail(const std::string& what) {
  running->error = what + " (block " + std::to_string(block().index) + ", thread " + std::to_string(current().index) + ")";
  for (;;) leave();
}

void wait(const Gate& gate, int generation) {
  Fibre& fibre = current();
  fibre.generation = generation;
  fibre.waits_for = &gate;
  while (gate.generation == generation) leave();
  fibre.waits_for = nullptr;
}

void sync_warp() { wait(block().warps[current().index / kWarp].barrier); }

void check_shared(const void* address, int size, const char* what) {
  const char* at = static_cast<const char*>(address);
  if (at < block().begin || at + size > block().end) fail(std::string(what) + " outside of shared memory");
  if ((at - block().begin) % size) fail(std::string(what) + " at an address that is no multiple of its size");
}

int thread_index() { return current().index; }
int block_index() { return block().index; }
int block_count() { return running->all; }
void sync_block() { wait(block().barrier); }

void copy_async(void* to, const void* from, int bytes, int size) {
  check_shared(to, size, "a copy");
  if (bytes < 0 || bytes > size) fail("a copy of " + std::to_string(bytes) + " bytes");
  if (bytes && reinterpret_cast<uintptr_t>(from) % size) fail("a copy from an address that is no multiple of its size");
  current().open_copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, size});
}

void copy_async_commit() {
  current().copies.push_back(std::move(current().open_copies));
  current().open_copies.clear();
}

// As late as the ISA allows: whoever reads earlier reads what was there before.
void copy_async_wait(int pending) {
  std::deque<std::vector<Copy>>& groups = current().copies;
  for (; static_cast<int>(groups.size()) > pending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.to, 0, copy.size);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

void load_matrices(uint32_t (&out)[4], const void* row, bool transposed) {
  check_shared(row, 16, "ldmatrix");
  Fibre& fibre = current();
  const int lane = fibre.index % kWarp;
  std::array<const char*, kWarp>& rows = block().warps[fibre.index / kWarp].rows[fibre.turn ^= 1];
  rows[lane] = static_cast<const char*>(row);
  sync_warp();
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
      for (int i = 0; i < 8; ++i) banks |= 1u << (rows[8 * matrix + i] - block().begin) / 16 % 8;
      running->report.bank_conflicts += banks != 0xFF;
    }
  }
}

const Fragments* exchange(const Fragments& mine) {
  Fibre& fibre = current();
  std::array<Fragments, kWarp>& lanes = block().warps[fibre.index / kWarp].fragments[fibre.turn ^= 1];
  lanes[fibre.index % kWarp] = mine;
  sync_warp();
  return lanes.data();
}

}  // namespace peft_kernels::emulator
