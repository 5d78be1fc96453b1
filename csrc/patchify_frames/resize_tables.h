// Tables of the antialiased resize along one axis, in the fixed-point numbers of torchvision's uint8 path.
#pragma once

#include <cstdint>
#include <vector>

namespace bridge_stg {

enum class Interpolation { kBilinear, kBicubic };

// Output pixel i is clamp((sum_j weights[i * taps + j] * in[start[i] + j] + 2^(precision - 1)) >> precision).
struct ResizeTable {
  int64_t in = 0, out = 0;
  int64_t taps = 0;              // room for weights an output pixel; the unused ones are 0
  int precision = 0;             // fractional bits of the weights
  std::vector<int32_t> start;    // [out] first input pixel
  std::vector<int32_t> count;    // [out] input pixels that weigh in
  std::vector<int16_t> weights;  // [out, taps]
};

// Computes the weights as ATen's `_compute_index_ranges_int16_weights` (aten/src/ATen/native/cpu/UpSampleKernel.cpp)
// does: in double, divided by their sum, rounded half away from zero at the largest precision <= 22 that fits int16.
ResizeTable make_resize_table(int64_t in, int64_t out, Interpolation interpolation);

}  // namespace bridge_stg
