// Vectors of sixteen floats with AVX-512; see simd_scalar.h for what each function does.
#pragma once

#include <immintrin.h>

#include "common/elements.h"

namespace bridge_stg {
namespace {

using Vec = __m512;

constexpr int kWidth = 16;
constexpr int kRegisters = 32;
constexpr bool kFused = true;

inline Vec splat(float value) { return _mm512_set1_ps(value); }

inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }

inline Vec load(const float* from) { return _mm512_loadu_ps(from); }

inline Vec load(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), from); }

inline Vec widen(__m256i bits, const BFloat16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline Vec widen(__m256i bits, const Float16*) { return _mm512_cvtph_ps(bits); }

template <typename T>
inline Vec load(const T* from) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), from);
}

template <typename T>
inline Vec load(const T* from, int64_t count) {
  return widen(_mm256_maskz_loadu_epi16(first_lanes(count), from), from);
}

inline __m256i narrow(Vec value, const BFloat16*) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16));
}

inline __m256i narrow(Vec value, const Float16*) { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }

inline void store(float* to, Vec value) { _mm512_storeu_ps(to, value); }

inline void store(float* to, Vec value, int64_t count) { _mm512_mask_storeu_ps(to, first_lanes(count), value); }

template <typename T>
inline void store(T* to, Vec value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(value, to));
}

template <typename T>
inline void store(T* to, Vec value, int64_t count) {
  _mm256_mask_storeu_epi16(to, first_lanes(count), narrow(value, to));
}

inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

inline Vec maximum(Vec a, Vec b) { return _mm512_max_ps(a, b); }

inline Vec maximum_or_nan(Vec a, Vec b) {
  return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);  // max gives b at a NaN
}

inline Vec zero_below(Vec value, Vec test, Vec bound) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(test, bound, _CMP_NLT_UQ), value);
}

inline Vec inverse_root(Vec square) {
  const __mmask16 some = _mm512_cmp_ps_mask(square, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  return _mm512_maskz_div_ps(some, splat(1.0f), _mm512_sqrt_ps(square));
}

inline Vec round_to_even(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline Vec power_of_two(Vec n) { return _mm512_scalef_ps(splat(1.0f), n); }

inline __m256 fold(Vec v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }

inline float sum(Vec v) {
  const __m256 quarter = fold(v);
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(quarter), _mm256_extractf128_ps(quarter, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline float largest(Vec v) { return _mm512_reduce_max_ps(v); }

inline void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(fold(a), fold(b)), _mm256_hadd_ps(fold(c), fold(d)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

inline int64_t count_at_least(const int32_t* keys, int64_t count, int32_t bound) {
  int64_t total = 0, i = 0;
  const __m512i limit = _mm512_set1_epi32(bound);
  for (; i + kWidth <= count; i += kWidth) {
    total += __builtin_popcount(_mm512_cmpge_epi32_mask(_mm512_loadu_si512(keys + i), limit));
  }
  if (i < count) {
    const __mmask16 rest = first_lanes(count - i);
    total += __builtin_popcount(_mm512_mask_cmpge_epi32_mask(rest, _mm512_maskz_loadu_epi32(rest, keys + i), limit));
  }
  return total;
}

inline void transpose_tile(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // a[i + c] holds column 4 lane + c of rows i..i+3
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 low = _mm512_shuffle_f32x4(a[c], a[c + 4], 0x88), low_odd = _mm512_shuffle_f32x4(a[c], a[c + 4], 0xdd);
    const __m512 high = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0x88);
    const __m512 high_odd = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0xdd);
    _mm512_storeu_ps(to + c * to_stride, _mm512_shuffle_f32x4(low, high, 0x88));
    _mm512_storeu_ps(to + (c + 4) * to_stride, _mm512_shuffle_f32x4(low_odd, high_odd, 0x88));
    _mm512_storeu_ps(to + (c + 8) * to_stride, _mm512_shuffle_f32x4(low, high, 0xdd));
    _mm512_storeu_ps(to + (c + 12) * to_stride, _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd));
  }
}

}  // namespace
}  // namespace bridge_stg
