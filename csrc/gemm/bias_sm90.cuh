// The bias of the columns that a thread holds sums of, as wgmma.cuh places them: loaded while products are under way.
#pragma once

#include "common/kernel_source.cuh"

#include <cstdint>
#include <cstring>

namespace peft_kernels {

// Of kSums sums of two rows: two neighbouring columns every eight, from `column` on.
template <typename T, int kSums>
struct BiasPairs {
  uint32_t pairs[kSums / 4];

  // Zeros without a bias, and from `columns` on, a multiple of 8. It may start on any element.
  PEFT_KERNELS_DEVICE BiasPairs(const void* bias, int columns, int column) {
    PEFT_KERNELS_UNROLL
    for (int j = 0; j < kSums / 4; ++j) pairs[j] = 0;
    const auto load = [&](const auto& at) {
      PEFT_KERNELS_UNROLL
      for (int j = 0; j < kSums / 4; ++j) {
        if (column + 8 * j < columns) pairs[j] = at(column + 8 * j);
      }
    };
    const uint16_t* from = static_cast<const uint16_t*>(bias);
    if (bias == nullptr) return;
    if (reinterpret_cast<uintptr_t>(bias) % 4 == 0) {
      load([&](int first) { return *reinterpret_cast<const uint32_t*>(from + first); });
    } else {
      load([&](int first) { return from[first] | static_cast<uint32_t>(from[first + 1]) << 16; });
    }
  }

  PEFT_KERNELS_DEVICE void add_to(float (&sums)[kSums]) const {
    PEFT_KERNELS_UNROLL
    for (int j = 0; j < kSums / 4; ++j) {
      T pair[2];
      std::memcpy(static_cast<void*>(pair), &pairs[j], sizeof(pair));
      PEFT_KERNELS_UNROLL
      for (int at = 0; at < 4; ++at) sums[4 * j + at] += static_cast<float>(pair[at % 2]);
    }
  }
};

}  // namespace peft_kernels
