// Vectors of four floats in portable C++: the level below AVX2. A file includes one of the three simd_*.h.
//
// Whatever these headers and the kernels define has internal linkage, and they call nothing of the standard library. An
// inline function with external linkage would be compiled with the flags of the level, and the linker might take that
// copy for files without these flags.
#pragma once

#include "common/elements.h"

namespace bridge_stg {
namespace {

using Vec = float __attribute__((vector_size(16)));

constexpr int kWidth = 4;
constexpr int kRegisters = 16;
constexpr bool kFused = false;  // whether multiply_add rounds once

inline Vec splat(float value) { return Vec{value, value, value, value}; }

template <typename T>
inline Vec load(const T* from) {
  return Vec{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
}

// Loads the first `count` < kWidth elements; the rest become zeros.
template <typename T>
inline Vec load(const T* from, int64_t count) {
  Vec value = splat(0.0f);
  for (int64_t i = 0; i < count; ++i) value[i] = to_float(from[i]);
  return value;
}

template <typename T>
inline void store(T* to, Vec value) {
  for (int i = 0; i < kWidth; ++i) from_float(value[i], to + i);
}

template <typename T>
inline void store(T* to, Vec value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) from_float(value[i], to + i);
}

inline Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }

// The larger of two lanes without NaN.
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// NaN where either is.
inline Vec maximum_or_nan(Vec a, Vec b) {
  const Vec larger = a > b ? a : b;
  return a != a ? a : larger;  // a NaN in b fails a > b, which takes b
}

// Zero where `test` < `bound`, else `value`.
inline Vec zero_below(Vec value, Vec test, Vec bound) { return test < bound ? splat(0.0f) : value; }

inline Vec inverse_root(Vec square) {
  Vec value;
  for (int i = 0; i < kWidth; ++i) value[i] = square[i] == 0.0f ? 0.0f : 1.0f / __builtin_sqrtf(square[i]);
  return value;
}

inline Vec round_to_even(Vec x) { return (x + splat(0x1.8p23f)) - splat(0x1.8p23f); }  // |x| < 2^22

// 2^n for whole n in -126..128; any value for NaN.
inline Vec power_of_two(Vec n) {
  Vec value;
  for (int i = 0; i < kWidth; ++i) {
    value[i] = n[i] == n[i] ? float_from_bits(static_cast<uint32_t>(static_cast<int32_t>(n[i]) + 127) << 23) : n[i];
  }
  return value;
}

inline float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }

inline float largest(Vec v) {
  const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}

// Writes the sums of four vectors, each summed in the same order.
inline void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  out[0] = sum(a);
  out[1] = sum(b);
  out[2] = sum(c);
  out[3] = sum(d);
}

// How many keys are at least `bound`.
inline int64_t count_at_least(const int32_t* keys, int64_t count, int32_t bound) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += keys[i] >= bound;
  return total;
}

// Transposes a tile of kWidth rows and columns.
inline void transpose_tile(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  for (int64_t i = 0; i < kWidth; ++i) {
    for (int64_t j = 0; j < kWidth; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

}  // namespace
}  // namespace bridge_stg
