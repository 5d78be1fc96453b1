// Pixels with AVX2. kernels_scalar.cpp says what each definition does.
#include "common/simd_avx2.h"
#include "patchify_frames/kernels.h"

namespace bridge_stg {
namespace {

inline __m128i load_sixteen(const uint8_t* in) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(in)); }

struct Splitter {
  static constexpr int64_t kPixels = 16;

  // index[c][part] takes, of the bytes of channel c, those that lie in the vector `part` of three.
  Splitter() {
    for (int c = 0; c < 3; ++c) {
      for (int part = 0; part < 3; ++part) {
        alignas(16) uint8_t bytes[16];
        for (int x = 0; x < 16; ++x) {
          const int source = 3 * x + c - 16 * part;
          bytes[x] = source >= 0 && source < 16 ? static_cast<uint8_t>(source) : 0x80;
        }
        index[c][part] = load_sixteen(bytes);
      }
    }
  }

  void operator()(const uint8_t* in, uint8_t* const out[3], int64_t x) const {
    const __m128i a = load_sixteen(in), b = load_sixteen(in + 16), d = load_sixteen(in + 32);
    for (int c = 0; c < 3; ++c) {
      const __m128i low = _mm_or_si128(_mm_shuffle_epi8(a, index[c][0]), _mm_shuffle_epi8(b, index[c][1]));
      const __m128i plane = _mm_or_si128(low, _mm_shuffle_epi8(d, index[c][2]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out[c] + x), plane);
    }
  }

  __m128i index[3][3];
};

constexpr VectorShape kShape{2, 4, 16};

struct Taps {
  using Vector = __m256i;

  static Vector splat(int32_t value) { return _mm256_set1_epi32(value); }

  static Vector load(const uint8_t* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }

  static Vector gather(const uint8_t* row, const int32_t* base) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load_sixteen(row + base[0])), load_sixteen(row + base[1]), 1);
  }

  static Vector pick(Vector source, Vector shuffle) { return _mm256_shuffle_epi8(source, shuffle); }

  static Vector add_products(Vector sums, Vector taps, Vector weights) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(taps, weights));
  }

  static void store(Vector sums, int precision, uint8_t* out) {
    const __m256i wide = _mm256_sra_epi32(sums, _mm_cvtsi32_si128(precision));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(words, words));
  }
};

inline int32_t dot(const uint8_t* pixels, const int16_t* weights, int64_t count) {
  __m256i sums = _mm256_setzero_si256();
  for (int64_t j = 0; j < count; j += 16) {
    const __m256i weight = _mm256_load_si256(reinterpret_cast<const __m256i*>(weights + j));
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_cvtepu8_epi16(load_sixteen(pixels + j)), weight));
  }
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

struct PixelSums {
  static constexpr int64_t kPixels = 32;

  explicit PixelSums(int32_t start) {
    for (__m256i& sum : sums) sum = _mm256_set1_epi32(start);
  }

  void add(const uint8_t* row_a, const uint8_t* row_b, int16_t weight_a, int16_t weight_b) {
    const __m256i zero = _mm256_setzero_si256();
    const uint32_t high_half = static_cast<uint32_t>(static_cast<uint16_t>(weight_b)) << 16;
    const uint32_t pair = high_half | static_cast<uint16_t>(weight_a);
    const __m256i weight = _mm256_set1_epi32(static_cast<int32_t>(pair));
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row_a));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row_b));
    const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
    sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), weight));
    sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), weight));
    sums[2] = _mm256_add_epi32(sums[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), weight));
    sums[3] = _mm256_add_epi32(sums[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), weight));
  }

  void store(int precision, uint8_t* out) const {
    const __m128i shift = _mm_cvtsi32_si128(precision);
    // The packs undo the unpacks of `add` in each half.
    const __m256i low = _mm256_packs_epi32(_mm256_sra_epi32(sums[0], shift), _mm256_sra_epi32(sums[1], shift));
    const __m256i high = _mm256_packs_epi32(_mm256_sra_epi32(sums[2], shift), _mm256_sra_epi32(sums[3], shift));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_packus_epi16(low, high));
  }

  __m256i sums[4];
};

inline Vec load_pixels(const uint8_t* in) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(in))));
}

inline void store_past_cache(float* to, Vec value) { _mm256_stream_ps(to, value); }

}  // namespace
}  // namespace bridge_stg

#include "patchify_frames/kernels-inl.h"

namespace bridge_stg {

template <>
const PatchifyKernels KernelsOf<PatchifyKernels>::avx2 = kKernels;

}  // namespace bridge_stg
