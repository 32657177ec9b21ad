// Maps of matrices for `tensor_copy.cuh`, encoded on the host. No torch: the self-test encodes them too.
#pragma once

#include "common/driver.h"

#include <cuda.h>

#include <cstdint>

// Bytes that a miss of the L2 cache fetches for a box: 128, or 256. Which is faster a GPU has to say (csrc/README.md).
#ifndef PEFT_KERNELS_L2_PROMOTION
#define PEFT_KERNELS_L2_PROMOTION 128
#endif

namespace peft_kernels {

static_assert(PEFT_KERNELS_L2_PROMOTION == 128 || PEFT_KERNELS_L2_PROMOTION == 256);
constexpr CUtensorMapL2promotion kL2Promotion =
    PEFT_KERNELS_L2_PROMOTION == 256 ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B;

// [height, width] of 16-bit elements, at least 1 each, rows `pitch` elements apart, to be copied in boxes of box_height rows
// of 64. Start and pitch are multiples of 16 bytes; of a single row the pitch may be 0. The driver computes it, for the thread's
// context: one is bound where there is none.
inline Status encode(CUtensorMap* map, const void* start, int64_t pitch, int height, int width, int box_height) {
  if (!driver::functions().all()) return cudaErrorNotSupported;
  if (const Status bound = driver::bind_context(); !bound.ok()) return bound;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(height)};
  const cuuint64_t pitches[] = {static_cast<cuuint64_t>(pitch ? pitch : (width + 7) / 8 * 8) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_height)}, steps[] = {1, 1};
  const CUresult result = driver::functions().encode_tiled(
      map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(start), sizes, pitches, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, kL2Promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return driver::status_of(result, "cuTensorMapEncodeTiled");
}

}  // namespace peft_kernels
