// The dropout contract of peft_kernels/ops/core/dropout.py, in C++: which element is dropped is a pure function
// of a seed. Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
#pragma once

#include "common/host_device.h"

#include <cstdint>

namespace peft_kernels::dropout {

constexpr int kRounds = 7;
constexpr int kColumns = 8;  // elements of a row that one draw of 128 bits decides: a byte of the mask

struct Words {
  uint32_t x, y, z, w;
};

PEFT_KERNELS_HOST_DEVICE Words philox(uint64_t seed, Words counter) {
  uint32_t key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product_0 = uint64_t{0xD2511F53} * counter.x, product_1 = uint64_t{0xCD9E8D57} * counter.z;
    counter = {static_cast<uint32_t>(product_1 >> 32) ^ counter.y ^ key_0, static_cast<uint32_t>(product_1),
               static_cast<uint32_t>(product_0 >> 32) ^ counter.w ^ key_1, static_cast<uint32_t>(product_0)};
    key_0 += 0x9E3779B9, key_1 += 0xBB67AE85;
  }
  return counter;
}

// Bits 0 and 1: whether the low and the high half of a word, read as signed 16 bits, reach the threshold.
PEFT_KERNELS_HOST_DEVICE uint32_t kept_pair(uint32_t word, int32_t threshold) {
  const int32_t low = static_cast<int16_t>(word & 0xFFFF), high = static_cast<int32_t>(word) >> 16;
  return static_cast<uint32_t>(low >= threshold) | static_cast<uint32_t>(high >= threshold) << 1;
}

// The byte of the mask for columns [8·group, 8·group + 8) of a row: bit i is set where column 8·group + i is kept.
PEFT_KERNELS_HOST_DEVICE uint8_t kept_byte(uint64_t seed, int64_t row, uint32_t group, uint32_t stream,
                                           int32_t threshold) {
  const Words draws = philox(
      seed, {static_cast<uint32_t>(row), group, static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32), stream});
  return static_cast<uint8_t>(kept_pair(draws.x, threshold) | kept_pair(draws.y, threshold) << 2 |
                              kept_pair(draws.z, threshold) << 4 | kept_pair(draws.w, threshold) << 6);
}

}  // namespace peft_kernels::dropout
