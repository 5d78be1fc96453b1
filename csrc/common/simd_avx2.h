// Vectors of eight floats with AVX2, FMA and F16C; see simd_scalar.h for what each function does.
#pragma once

#include <immintrin.h>

#include "common/elements.h"

namespace bridge_stg {
namespace {

using Vec = __m256;

constexpr int kWidth = 8;
constexpr int kRegisters = 16;
constexpr bool kFused = true;

inline Vec splat(float value) { return _mm256_set1_ps(value); }

inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec load(const float* from) { return _mm256_loadu_ps(from); }

inline Vec load(const float* from, int64_t count) { return _mm256_maskload_ps(from, first_lanes(count)); }

inline Vec widen(__m128i bits, const BFloat16*) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline Vec widen(__m128i bits, const Float16*) { return _mm256_cvtph_ps(bits); }

template <typename T>
inline Vec load(const T* from) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), from);
}

template <typename T>
inline Vec load(const T* from, int64_t count) {
  alignas(16) T all[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) all[i] = from[i];
  return widen(_mm_load_si128(reinterpret_cast<const __m128i*>(all)), from);
}

inline __m128i narrow(Vec value, const BFloat16*) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

inline __m128i narrow(Vec value, const Float16*) { return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }

inline void store(float* to, Vec value) { _mm256_storeu_ps(to, value); }

inline void store(float* to, Vec value, int64_t count) { _mm256_maskstore_ps(to, first_lanes(count), value); }

template <typename T>
inline void store(T* to, Vec value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow(value, to));
}

template <typename T>
inline void store(T* to, Vec value, int64_t count) {
  alignas(16) T all[kWidth];
  _mm_store_si128(reinterpret_cast<__m128i*>(all), narrow(value, to));
  for (int64_t i = 0; i < count; ++i) to[i] = all[i];
}

inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

inline Vec maximum(Vec a, Vec b) { return _mm256_max_ps(a, b); }

inline Vec maximum_or_nan(Vec a, Vec b) {
  return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));  // max gives b at a NaN
}

inline Vec zero_below(Vec value, Vec test, Vec bound) {
  return _mm256_andnot_ps(_mm256_cmp_ps(test, bound, _CMP_LT_OQ), value);
}

inline Vec inverse_root(Vec square) {
  const Vec zero = _mm256_cmp_ps(square, _mm256_setzero_ps(), _CMP_EQ_OQ);
  return _mm256_andnot_ps(zero, splat(1.0f) / _mm256_sqrt_ps(square));
}

inline Vec round_to_even(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline Vec power_of_two(Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

inline float sum(Vec v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline float largest(Vec v) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

inline void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

inline int64_t count_at_least(const int32_t* keys, int64_t count, int32_t bound) {
  int64_t total = 0, i = 0;
  const __m256i limit = _mm256_set1_epi32(bound);
  for (; i + kWidth <= count; i += kWidth) {
    const __m256i below = _mm256_cmpgt_epi32(limit, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i)));
    total += kWidth - __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(below))));
  }
  for (; i < count; ++i) total += keys[i] >= bound;
  return total;
}

inline void transpose_tile(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * from_stride);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}

}  // namespace
}  // namespace bridge_stg
