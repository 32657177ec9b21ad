// The instructions of sm_90: clusters, barriers with phases, boxes copied by an engine of their own, products of warpgroups.
#include "emulator/block.h"

#include <utility>

namespace peft_kernels::emulator {
namespace {

constexpr int kBoxWidth = 64, kRowBytes = 128;

PhasedBarrier& phased(Block& block, const void* barrier) {
  check_shared(barrier, sizeof(uint64_t), "an mbarrier");
  const auto found = block.phased.find(static_cast<const char*>(barrier) - emulator::block().begin);
  if (found == block.phased.end()) fail("an mbarrier that was not initialised");
  return found->second;
}

// 16 bytes at position i of row r of every 1024 lie at position i ^ r.
int64_t swizzled(int64_t offset) { return offset ^ (offset >> 3 & 0x70); }

void check_box(const TensorMap& map, const void* place) {
  check_shared(place, 16, "a box");
  const char* at = static_cast<const char*>(place);
  if ((at - block().begin) % 1024) fail("a box at an address that is no multiple of 1024");
  if (at + map.box_height * kRowBytes > block().end) fail("a box outside of shared memory");
  if (map.box_height < 1 || map.box_height > 256) fail("a box of " + std::to_string(map.box_height) + " rows");
  if (map.height < 1 || map.width < 1) fail("a box of a matrix without elements");
  if (reinterpret_cast<uintptr_t>(map.start) % 16 || map.pitch % 8) fail("a matrix whose rows do not start on 16 bytes");
}

// Each element of the box: its place in shared memory, and in the matrix, or null beyond it.
template <typename Of>
void each_element(const TensorMap& map, int row, int column, const Of& of) {
  for (int i = 0; i < map.box_height; ++i) {
    for (int k = 0; k < kBoxWidth; ++k) {
      const int64_t y = int64_t{row} + i, x = int64_t{column} + k;
      const bool inside = y >= 0 && x >= 0 && y < map.height && x < map.width;
      of(swizzled(i * kRowBytes + 2 * k), inside ? map.start + 2 * (y * map.pitch + x) : nullptr);
    }
  }
}

// The element of an operand at (feature, k), as PTX ISA 9.7.15.5.1.2 lays it out.
uint16_t operand(const char* shared, uint64_t descriptor, bool by_feature, int feature, int k) {
  const int64_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4;
  const int64_t stride = (descriptor >> 32 & 0x3FFF) << 4;
  const int64_t offset = by_feature ? feature / 8 * stride + feature % 8 * kRowBytes + 2 * k
                                    : feature / 64 * leading + feature % 64 * 2 + k / 8 * stride + k % 8 * kRowBytes;
  uint16_t bits;
  std::memcpy(&bits, shared + swizzled(start + offset), sizeof(bits));
  return bits;
}

void compute(const Product& product) {
  const int thread = current().index % 128, row_0 = thread / 32 * 16 + thread % 32 / 4, column_0 = 2 * (thread % 4);
  const char* shared = block().begin;
  float a[2][16];
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < 16; ++k) {
      a[i][k] = product.rows ? (*product.rows)[i][k]
                             : product.wide(operand(shared, product.a, product.a_by_feature, row_0 + 8 * i, k));
    }
  }
  for (int j = 0; j < product.count / 4; ++j) {
    for (int right = 0; right < 2; ++right) {
      float sums[2] = {};
      for (int k = 0; k < 16; ++k) {
        const float b = product.wide(operand(shared, product.b, product.b_by_feature, 8 * j + column_0 + right, k));
        for (int i = 0; i < 2; ++i) sums[i] += a[i][k] * b;
      }
      for (int i = 0; i < 2; ++i) {
        float& sum = product.sums[4 * j + 2 * i + right];
        sum = product.onto ? sum + sums[i] : sums[i];
      }
    }
  }
}

}  // namespace

int cluster_rank() { return block().rank; }
void sync_cluster() { wait(running->barrier); }

void sync_named(int name, int threads) {
  if (name < 1 || name > 15 || threads % kWarp) fail("a named barrier " + std::to_string(name));
  wait(block().named.try_emplace(name, threads).first->second);
}

uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - block().begin);
}

void mbarrier_init(uint64_t* barrier, int expected) {
  check_shared(barrier, sizeof(uint64_t), "an mbarrier");
  PhasedBarrier fresh;
  fresh.expected = expected;
  block().phased[shared_address(barrier)] = fresh;
}

void mbarrier_arrive(uint64_t* barrier, int rank, int bytes) {
  if (rank < 0 || rank >= static_cast<int>(running->blocks.size())) fail("an arrival outside of the cluster");
  PhasedBarrier& at = phased(*running->blocks[rank], barrier);
  at.bytes += bytes;
  if (++at.arrived > at.expected) fail("more arrivals than were expected");
  at.pass();
}

void mbarrier_wait(uint64_t* barrier, int parity) {
  const PhasedBarrier& at = phased(block(), barrier);
  if (at.generation % 2 == parity) wait(at, at.generation);
}

void box_load(void* to, const TensorMap& map, int row, int column, uint64_t* loaded, unsigned blocks) {
  check_box(map, to);
  for (auto& target : running->blocks) {
    if (!(blocks >> target->rank & 1)) continue;
    PhasedBarrier* barrier = &phased(*target, loaded);
    char* there = target->begin + shared_address(to);
    Work load = [=] {
      each_element(map, row, column, [&](int64_t offset, const char* from) {
        if (from == nullptr) {
          std::memset(there + offset, 0, 2);
        } else {
          std::memcpy(there + offset, from, 2);
        }
      });
      barrier->bytes -= map.box_height * kRowBytes;
      barrier->pass();
    };
    if (running->late) {
      running->loads.push_back(std::move(load));
    } else {
      load();
    }
  }
}

void box_store(const TensorMap& map, int row, int column, const void* from) {
  check_box(map, from);
  const char* there = static_cast<const char*>(from);
  current().stores.push_back([=] {
    each_element(map, row, column, [&](int64_t offset, char* to) {
      if (to != nullptr) std::memcpy(to, there + offset, 2);
    });
  });
}

// As late as the ISA allows.
void stores_wait(int pending) {
  for (std::deque<Work>& stores = current().stores; static_cast<int>(stores.size()) > pending; stores.pop_front()) {
    stores.front()();
  }
}

void wgmma(const Product& product) {
  if (running->late) {
    compute(product);
  } else {
    current().open_products.push_back(product);
  }
}

void wgmma_commit() {
  current().products.push_back(std::move(current().open_products));
  current().open_products.clear();
}

void wgmma_wait(int pending) {
  std::deque<std::vector<Product>>& groups = current().products;
  for (; static_cast<int>(groups.size()) > pending; groups.pop_front()) {
    for (const Product& product : groups.front()) compute(product);
  }
  sync_warp();
}

}  // namespace peft_kernels::emulator
