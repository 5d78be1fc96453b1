// Pixels with AVX-512. kernels_scalar.cpp says what each definition does.
#include "common/simd_avx512.h"
#include "patchify_frames/kernels.h"

namespace bridge_stg {
namespace {

struct Splitter {
  static constexpr int64_t kPixels = 64;

  // Of 64 pixels in three vectors, index[c] takes the bytes of channel c: the first 128 bytes come from the first two
  // vectors, those of the mask from the third.
  Splitter() {
    for (int c = 0; c < 3; ++c) {
      alignas(64) uint8_t bytes[64];
      from_third[c] = 0;
      for (int x = 0; x < 64; ++x) {
        const int source = 3 * x + c;
        bytes[x] = static_cast<uint8_t>(source & 127);
        if (source >= 128) from_third[c] |= __mmask64{1} << x;
      }
      index[c] = _mm512_load_si512(bytes);
    }
  }

  void operator()(const uint8_t* in, uint8_t* const out[3], int64_t x) const {
    const __m512i a = _mm512_loadu_si512(in), b = _mm512_loadu_si512(in + 64), d = _mm512_loadu_si512(in + 128);
    for (int c = 0; c < 3; ++c) {
      const __m512i plane = _mm512_permutex2var_epi8(a, index[c], b);
      _mm512_storeu_si512(out[c] + x, _mm512_mask_permutexvar_epi8(plane, from_third[c], index[c], d));
    }
  }

  __m512i index[3];
  __mmask64 from_third[3];
};

constexpr VectorShape kShape{1, 16, 64};

struct Taps {
  using Vector = __m512i;

  static Vector splat(int32_t value) { return _mm512_set1_epi32(value); }

  static Vector load(const uint8_t* from) { return _mm512_load_si512(from); }

  static Vector gather(const uint8_t* row, const int32_t* base) { return _mm512_loadu_si512(row + *base); }

  // Every second byte of a shuffle is 0x80, which this instruction does not take for zero.
  static Vector pick(Vector source, Vector shuffle) {
    return _mm512_maskz_permutexvar_epi8(0x5555555555555555, shuffle, source);
  }

  static Vector add_products(Vector sums, Vector taps, Vector weights) {
    return _mm512_add_epi32(sums, _mm512_madd_epi16(taps, weights));
  }

  static void store(Vector sums, int precision, uint8_t* out) {
    const __m512i wide = _mm512_max_epi32(_mm512_sra_epi32(sums, _mm_cvtsi32_si128(precision)), _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtusepi32_epi8(wide));
  }
};

inline int32_t dot(const uint8_t* pixels, const int16_t* weights, int64_t count) {
  __m512i sums = _mm512_setzero_si512();
  for (int64_t j = 0; j < count; j += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pixels + j));
    sums = _mm512_add_epi32(sums, _mm512_madd_epi16(_mm512_cvtepu8_epi16(bytes), _mm512_load_si512(weights + j)));
  }
  return _mm512_reduce_add_epi32(sums);
}

struct PixelSums {
  static constexpr int64_t kPixels = 64;

  explicit PixelSums(int32_t start) {
    for (__m512i& sum : sums) sum = _mm512_set1_epi32(start);
  }

  void add(const uint8_t* row_a, const uint8_t* row_b, int16_t weight_a, int16_t weight_b) {
    const __m512i zero = _mm512_setzero_si512();
    const uint32_t high_half = static_cast<uint32_t>(static_cast<uint16_t>(weight_b)) << 16;
    const uint32_t pair = high_half | static_cast<uint16_t>(weight_a);
    const __m512i weight = _mm512_set1_epi32(static_cast<int32_t>(pair));
    const __m512i a = _mm512_loadu_si512(row_a), b = _mm512_loadu_si512(row_b);
    const __m512i low = _mm512_unpacklo_epi8(a, b), high = _mm512_unpackhi_epi8(a, b);
    sums[0] = _mm512_add_epi32(sums[0], _mm512_madd_epi16(_mm512_unpacklo_epi8(low, zero), weight));
    sums[1] = _mm512_add_epi32(sums[1], _mm512_madd_epi16(_mm512_unpackhi_epi8(low, zero), weight));
    sums[2] = _mm512_add_epi32(sums[2], _mm512_madd_epi16(_mm512_unpacklo_epi8(high, zero), weight));
    sums[3] = _mm512_add_epi32(sums[3], _mm512_madd_epi16(_mm512_unpackhi_epi8(high, zero), weight));
  }

  void store(int precision, uint8_t* out) const {
    const __m128i shift = _mm_cvtsi32_si128(precision);
    // The packs undo the unpacks of `add` in each quarter.
    const __m512i low = _mm512_packs_epi32(_mm512_sra_epi32(sums[0], shift), _mm512_sra_epi32(sums[1], shift));
    const __m512i high = _mm512_packs_epi32(_mm512_sra_epi32(sums[2], shift), _mm512_sra_epi32(sums[3], shift));
    _mm512_storeu_si512(out, _mm512_packus_epi16(low, high));
  }

  __m512i sums[4];
};

inline Vec load_pixels(const uint8_t* in) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in))));
}

inline void store_past_cache(float* to, Vec value) { _mm512_stream_ps(to, value); }

}  // namespace
}  // namespace bridge_stg

#include "patchify_frames/kernels-inl.h"

namespace bridge_stg {

template <>
const PatchifyKernels KernelsOf<PatchifyKernels>::avx512 = kKernels;

}  // namespace bridge_stg
