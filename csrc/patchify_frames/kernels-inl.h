// The kernels of kernels.h over the vectors of a simd_*.h and the pixel vectors of the kernels_<level>.cpp that
// includes this file. kernels_scalar.cpp says what a level has to define. The kernels have internal linkage and call
// nothing of the standard library; simd_scalar.h says why.
#pragma once

#include "common/simd_math.h"
#include "patchify_frames/kernels.h"

namespace bridge_stg {
namespace {

void split(const uint8_t* in, int64_t width, uint8_t* const out[3]) {
  const Splitter splitter;
  int64_t x = 0;
  for (; x + Splitter::kPixels <= width; x += Splitter::kPixels) splitter(in + 3 * x, out, x);
  for (; x < width; ++x) {
    for (int c = 0; c < 3; ++c) out[c][x] = in[3 * x + c];
  }
}

template <typename Taps, bool kOneLoad, int kRows>
void windows(const ResizeTable& table, const HorizontalPlan& plan, const uint8_t* const* in, uint8_t* const* out) {
  constexpr int64_t kOutputs = kShape.lanes * kShape.outputs, kBytes = 4 * kOutputs;
  const int32_t* base = reinterpret_cast<const int32_t*>(plan.base.data());
  const uint8_t* shuffles = plan.shuffle.data();
  const uint8_t* weights = plan.weights.data();
  for (int64_t window = 0; window < plan.windows; ++window, base += kShape.lanes) {
    typename Taps::Vector sums[kRows], source[kRows];
    for (int r = 0; r < kRows; ++r) {
      sums[r] = Taps::splat(1 << (table.precision - 1));
      if (kOneLoad) source[r] = Taps::gather(in[r], base);
    }
    auto shuffle = Taps::load(shuffles);
    for (int64_t k = 0; k < plan.pairs; ++k, weights += kBytes) {
      if (kOneLoad) shuffle = Taps::load(shuffles + kBytes * k);
      const auto weight = Taps::load(weights);
      for (int r = 0; r < kRows; ++r) {
        if (!kOneLoad) source[r] = Taps::gather(in[r] + 2 * k, base);
        sums[r] = Taps::add_products(sums[r], Taps::pick(source[r], shuffle), weight);
      }
    }
    shuffles += kBytes * (kOneLoad ? plan.pairs : 1);
    for (int r = 0; r < kRows; ++r) Taps::store(sums[r], table.precision, out[r] + kOutputs * window);
  }
}

template <int kRows>
void dots(const ResizeTable& table, const HorizontalPlan& plan, const uint8_t* const* in, uint8_t* const* out) {
  const int16_t* weights = reinterpret_cast<const int16_t*>(plan.weights.data());
  for (int64_t i = 0; i < table.out; ++i, weights += plan.padded_taps) {
    for (int r = 0; r < kRows; ++r) {
      const int32_t sum = dot(in[r] + table.start[i], weights, table.count[i]) + (1 << (table.precision - 1));
      const int32_t value = sum >> table.precision;
      out[r][i] = static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
    }
  }
}

template <typename Taps, int kRows>
void resize_rows(const ResizeTable& table, const HorizontalPlan& plan, const uint8_t* const* in, uint8_t* const* out) {
  if constexpr (kShape.lanes > 0) {
    if (plan.kind == HorizontalPlan::Kind::kOneLoad) return windows<Taps, true, kRows>(table, plan, in, out);
    if (plan.kind == HorizontalPlan::Kind::kPairLoad) return windows<Taps, false, kRows>(table, plan, in, out);
  }
  dots<kRows>(table, plan, in, out);
}

void horizontal(const ResizeTable& table, const HorizontalPlan& plan, const uint8_t* const* in, uint8_t* const* out,
                int64_t rows) {
  for (; rows >= 4; rows -= 4, in += 4, out += 4) resize_rows<Taps, 4>(table, plan, in, out);
  for (; rows > 0; --rows, ++in, ++out) resize_rows<Taps, 1>(table, plan, in, out);
}

void vertical(const int16_t* weights, int64_t count, int precision, const uint8_t* const* rows, int64_t width,
              uint8_t* out) {
  for (int64_t x = 0; x < width; x += PixelSums::kPixels) {
    PixelSums sums(1 << (precision - 1));
    for (int64_t j = 0; j + 1 < count; j += 2) sums.add(rows[j] + x, rows[j + 1] + x, weights[j], weights[j + 1]);
    if (count % 2 == 1) sums.add(rows[count - 1] + x, rows[count - 1] + x, weights[count - 1], 0);
    sums.store(precision, out + x);
  }
}

inline void look_up(const Channel& channel, uint8_t pixel, float* out) { *out = channel.value[pixel]; }

template <typename T>
void look_up(const Channel& channel, uint8_t pixel, T* out) {
  out->bits = channel.half[pixel];
}

template <typename T>
void normalize_pixels(const Channel& channel, const uint8_t* in, int64_t count, T* out, bool stream) {
  const Vec mean = splat(channel.mean), minus_std = splat(-channel.std), reciprocal = splat(channel.reciprocal);
  const auto values = [&](int64_t i) {
    const Vec x = load_pixels(in + i) - mean, quotient = x * reciprocal;
    return multiply_add(multiply_add(quotient, minus_std, x), reciprocal, quotient);
  };
  int64_t i = 0;
  if constexpr (sizeof(T) == 4) {
    if (stream) {
      constexpr int64_t kBytes = 4 * kWidth;
      const int64_t head = (kBytes - reinterpret_cast<uintptr_t>(out) % kBytes) % kBytes / 4;
      if (head > 0) store(out, values(0), smaller(head, count));
      for (i = head; i + kWidth <= count; i += kWidth) store_past_cache(out + i, values(i));
    }
  }
  for (; i + kWidth <= count; i += kWidth) store(out + i, values(i));
  if (i < count) store(out + i, values(i), count - i);
}

void normalize(const Normalization& normalization, int channel, const uint8_t* in, int64_t count, void* out,
               bool stream) {
  const Channel& values = normalization.channel[channel];
  with_element(normalization.type, [&](auto element) {
    auto* to = static_cast<decltype(element)*>(out);
    if (kFused && normalization.reciprocal_is_exact) {
      normalize_pixels(values, in, count, to, stream);
    } else {
      for (int64_t i = 0; i < count; ++i) look_up(values, in[i], to + i);
    }
  });
}

constexpr PatchifyKernels kKernels = {kShape, split, horizontal, vertical, normalize};

}  // namespace
}  // namespace bridge_stg
