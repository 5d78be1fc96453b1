// The kernels of kernels.h over the vectors of the simd_*.h that was included before. They have internal linkage and
// call nothing of the standard library; simd_scalar.h says why.
#pragma once

#include "attend_memory/kernels.h"
#include "attend_memory/product-inl.h"
#include "common/simd_math.h"

namespace bridge_stg {
namespace {

void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t width, float factor, float* to,
               int64_t to_stride) {
  const int64_t padded = (rows + kColumns - 1) / kColumns * kColumns;
  const int64_t whole_rows = rows / kWidth * kWidth, whole_width = width / kWidth * kWidth;
  for (int64_t r = 0; r < whole_rows; r += kWidth) {
    for (int64_t c = 0; c < whole_width; c += kWidth) {
      transpose_tile(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    }
    for (int64_t c = whole_width; c < width; ++c) {
      for (int64_t i = r; i < r + kWidth; ++i) to[c * to_stride + i] = from[i * from_stride + c];
    }
  }
  for (int64_t c = 0; c < width; ++c) {
    for (int64_t r = whole_rows; r < rows; ++r) to[c * to_stride + r] = from[r * from_stride + c];
    for (int64_t r = rows; r < padded; ++r) to[c * to_stride + r] = 0.0f;
  }
  if (factor == 1.0f) return;
  const Vec scale = splat(factor);
  for (int64_t c = 0; c < width; ++c) {
    for (int64_t r = 0; r < padded; r += kWidth) store(to + c * to_stride + r, scale * load(to + c * to_stride + r));
  }
}

template <typename T>
void widen_elements(const T* from, const T* extra, int64_t count, float* to) {
  const int64_t whole = count / kWidth * kWidth, rest = count - whole;
  for (int64_t i = 0; i < whole; i += kWidth) store(to + i, extra ? load(from + i) + load(extra + i) : load(from + i));
  if (rest > 0) {
    const Vec last = load(from + whole, rest);
    store(to + whole, extra ? last + load(extra + whole, rest) : last, rest);
  }
}

void widen(ElementType type, const void* from, const void* extra, int64_t count, float* to) {
  with_element(type, [&](auto element) {
    using T = decltype(element);
    widen_elements(static_cast<const T*>(from), static_cast<const T*>(extra), count, to);
  });
}

template <typename T>
void narrow_elements(const float* from, float factor, int64_t count, T* to) {
  const int64_t whole = count / kWidth * kWidth, rest = count - whole;
  const Vec scale = splat(factor);
  for (int64_t i = 0; i < whole; i += kWidth) store(to + i, scale * load(from + i));
  if (rest > 0) store(to + whole, scale * load(from + whole, rest), rest);
}

void narrow(const float* from, float factor, int64_t count, ElementType type, void* to) {
  with_element(type, [&](auto element) { narrow_elements(from, factor, count, static_cast<decltype(element)*>(to)); });
}

void peaks(const Block& score, const float* key_bias, float* peak) {
  for (int64_t c = 0; c < score.columns; c += kWidth) {
    Vec top = load(peak + c);
    float* at = score.data + c;
    if (key_bias == nullptr) {
      for (int64_t k = 0; k < score.keys; ++k, at += score.stride) top = maximum_or_nan(load(at), top);
    } else {
      for (int64_t k = 0; k < score.keys; ++k, at += score.stride) {
        const Vec value = load(at) + splat(key_bias[k]);
        store(at, value);
        top = maximum_or_nan(value, top);
      }
    }
    store(peak + c, top);
  }
}

// Loads peaks, with 0 for a row that has seen no key yet, so that exp(-inf - peak) is 0 and not NaN.
inline Vec finite_peak(const float* peak) {
  const Vec value = load(peak);
  return zero_below(value, value, splat(-3.4e38f));
}

void exponentials(const Block& score, const float* peak, float* total) {
  for (int64_t c = 0; c < score.columns; c += kWidth) {
    const Vec top = finite_peak(peak + c);
    Vec sum = load(total + c);
    float* at = score.data + c;
    for (int64_t k = 0; k < score.keys; ++k, at += score.stride) {
      const Vec value = exponential(load(at) - top);
      store(at, value);
      sum = sum + value;
    }
    store(total + c, sum);
  }
}

void scale(const Block& block, const float* factor) {
  for (int64_t k = 0; k < block.keys; ++k) {
    float* at = block.data + k * block.stride;
    for (int64_t c = 0; c < block.columns; c += kWidth) store(at + c, load(at + c) * load(factor + c));
  }
}

void decay(const float* from, const float* to, int64_t count, float* factor) {
  for (int64_t c = 0; c < count; c += kWidth) store(factor + c, exponential(load(from + c) - finite_peak(to + c)));
}

void weighted_sums(const Block& p, const float* dp, float* total) {
  for (int64_t c = 0; c < p.columns; c += kWidth) {
    Vec sum = load(total + c);
    for (int64_t k = 0; k < p.keys; ++k) {
      sum = multiply_add(load(p.data + k * p.stride + c), load(dp + k * p.stride + c), sum);
    }
    store(total + c, sum);
  }
}

void row_sums(const Block& block, int64_t rows, float* sums) {
  const int64_t whole = rows / kWidth * kWidth;
  for (int64_t k = 0; k < block.keys; ++k) {
    const float* at = block.data + k * block.stride;
    Vec total = splat(0.0f);
    for (int64_t c = 0; c < whole; c += kWidth) total = total + load(at + c);
    if (whole < rows) total = total + load(at + whole, rows - whole);
    sums[k] = sum(total);
  }
}

void score_gradient(const Block& p, float* dp, const float* delta, float factor, int64_t rows, float* sums) {
  for (int64_t k = 0; k < p.keys; ++k) {
    const float* probability = p.data + k * p.stride;
    float* at = dp + k * p.stride;
    for (int64_t c = 0; c < p.columns; c += kWidth) {
      store(at + c, load(probability + c) * (load(at + c) - load(delta + c)));
    }
  }
  const Block gradient{dp, p.keys, p.columns, p.stride};
  if (sums != nullptr) row_sums(gradient, rows, sums);
  if (factor == 1.0f) return;
  const Vec by = splat(factor);
  for (int64_t k = 0; k < p.keys; ++k) {
    float* at = dp + k * p.stride;
    for (int64_t c = 0; c < p.columns; c += kWidth) store(at + c, by * load(at + c));
  }
}

constexpr AttendKernels kKernels = {product, transpose, widen,         narrow,         peaks,   exponentials,
                                    scale,   decay,     weighted_sums, score_gradient, row_sums};

}  // namespace
}  // namespace bridge_stg
