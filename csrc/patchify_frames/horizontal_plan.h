// The horizontal pass of a resize, laid out for the vectors of a SIMD level.
#pragma once

#include "common/aligned_bytes.h"
#include "patchify_frames/resize_tables.h"

namespace bridge_stg {

// Rows of pixels have this many bytes of room after the last pixel that a filter may touch, so that kernels can load
// and store whole vectors.
constexpr int64_t kRowSlack = 128;

// Taps of a dot product are padded with zeros to a multiple of this.
constexpr int64_t kDotTaps = 32;

// What one vector of a SIMD level holds: `lanes` parts, each with `outputs` neighbouring output pixels, whose taps a
// byte shuffle picks from one load of `bytes` bytes.
struct VectorShape {
  int64_t lanes, outputs, bytes;
};

// A vector computes a window of lanes * outputs output pixels. Its taps are multiplied and added in pairs, as int16.
struct HorizontalPlan {
  enum class Kind {
    kOneLoad,   // one load for each lane holds all taps of its outputs
    kPairLoad,  // one load for each lane and pair of taps
    kDot,       // the filter is too wide for windows: one dot product for each output pixel
  };
  Kind kind = Kind::kDot;
  int64_t windows = 0, pairs = 0, padded_taps = 0;
  AlignedBytes base;     // int32 [windows, lanes]: first input pixel of a lane
  AlignedBytes shuffle;  // uint8 [windows, pairs (kOneLoad) or 1, lanes, outputs, 4]: low byte, 0x80, low byte, 0x80
  AlignedBytes weights;  // int16 [windows, pairs, lanes, outputs, 2]; for kDot [out, padded_taps]
};

// Lays a table out for vectors of a shape; a shape of no lanes gives a plan of dot products.
HorizontalPlan make_plan(const ResizeTable& table, const VectorShape& shape);

}  // namespace bridge_stg
