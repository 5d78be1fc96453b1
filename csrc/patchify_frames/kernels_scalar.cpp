// Pixels in portable C++, and what a level has to define for kernels-inl.h.
#include "common/simd_scalar.h"
#include "patchify_frames/kernels.h"

namespace bridge_stg {
namespace {

// Splits kPixels pixels of three bytes at `in` into out[0..2] at `x`.
struct Splitter {
  static constexpr int64_t kPixels = 1;

  void operator()(const uint8_t* in, uint8_t* const out[3], int64_t x) const {
    for (int c = 0; c < 3; ++c) out[c][x] = in[c];
  }
};

// The windows of the horizontal pass: `Taps` has the operations of a vector of `kShape`. A level without windows has no
// lanes, and its `Taps` is void.
constexpr VectorShape kShape{0, 0, 0};
using Taps = void;

// The sum of pixels[j] * weights[j]; pixels and weights may be read up to the next multiple of kDotTaps.
int32_t dot(const uint8_t* pixels, const int16_t* weights, int64_t count) {
  int32_t sum = 0;
  for (int64_t j = 0; j < count; ++j) sum += pixels[j] * weights[j];
  return sum;
}

// Sums of kPixels neighbouring pixels of an output row; `add` adds two source rows, each times its weight.
struct PixelSums {
  static constexpr int64_t kPixels = 16;

  explicit PixelSums(int32_t start) {
    for (int32_t& sum : sums) sum = start;
  }

  void add(const uint8_t* a, const uint8_t* b, int16_t weight_a, int16_t weight_b) {
    for (int x = 0; x < kPixels; ++x) sums[x] += a[x] * weight_a + b[x] * weight_b;
  }

  void store(int precision, uint8_t* out) const {
    for (int x = 0; x < kPixels; ++x) {
      const int32_t value = sums[x] >> precision;
      out[x] = static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
    }
  }

  int32_t sums[kPixels];
};

// The next kWidth pixels as floats; more may be read.
inline Vec load_pixels(const uint8_t* in) {
  return Vec{static_cast<float>(in[0]), static_cast<float>(in[1]), static_cast<float>(in[2]),
             static_cast<float>(in[3])};
}

// Stores an aligned vector without keeping it in the cache, where the level can do so.
inline void store_past_cache(float* to, Vec value) { store(to, value); }

}  // namespace
}  // namespace bridge_stg

#include "patchify_frames/kernels-inl.h"

namespace bridge_stg {

template <>
const PatchifyKernels KernelsOf<PatchifyKernels>::scalar = kKernels;

}  // namespace bridge_stg
