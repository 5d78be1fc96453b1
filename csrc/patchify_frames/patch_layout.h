// The patch layout of Qwen-VL vision towers, shared by the CPU and the CUDA kernel.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define BRIDGE_STG_HOST_DEVICE __host__ __device__ __forceinline__
#define BRIDGE_STG_PRAGMA(text) _Pragma(#text)
#define BRIDGE_STG_UNROLL(count) BRIDGE_STG_PRAGMA(unroll count)
#else
#define BRIDGE_STG_HOST_DEVICE inline
#define BRIDGE_STG_UNROLL(count)
#endif

namespace bridge_stg {

struct PatchLayout {
  int64_t patch = 14;    // P, pixels a side
  int64_t temporal = 2;  // tp, frames
  int64_t merge = 2;     // m, patches a side that the tower merges

  // The width of an output row, whose columns are ((c tp + dt) P + py) P + px.
  BRIDGE_STG_HOST_DEVICE int64_t columns() const { return 3 * temporal * patch * patch; }

  // The output row of the patch at (gy, gx) in the gh x gw grid of temporal group t:
  // (((t gh/m + hb) gw/m + wb) m + mh) m + mw with gy = hb m + mh, gx = wb m + mw.
  BRIDGE_STG_HOST_DEVICE int64_t row(int64_t t, int64_t gy, int64_t gx, int64_t gh, int64_t gw) const {
    return merge_row(t, gy / merge, gh, gw) + row_within(gy % merge, gx, merge);
  }

  // The first output row of merge row hb, and the place in it of the patch of row mh and column gx.
  BRIDGE_STG_HOST_DEVICE int64_t merge_row(int64_t t, int64_t hb, int64_t gh, int64_t gw) const {
    return (t * (gh / merge) + hb) * gw * merge;
  }

  template <typename Int>
  BRIDGE_STG_HOST_DEVICE static Int row_within(Int mh, Int gx, Int merge) {
    return (gx / merge * merge + mh) * merge + gx % merge;
  }

  // The position of frame dt of group t among the frames asked for, the last of which repeats.
  BRIDGE_STG_HOST_DEVICE int64_t frame(int64_t t, int64_t dt, int64_t frames) const {
    const int64_t position = t * temporal + dt;
    return position < frames ? position : frames - 1;
  }
};

}  // namespace bridge_stg
