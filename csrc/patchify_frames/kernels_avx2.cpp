// Rows of pixels with AVX2, FMA and F16C. Nothing but these kernels may be compiled with these flags: an inline
// function of a shared header, emitted here, could be what other files are linked to.
#include <immintrin.h>

#include "patchify_frames/kernels.h"

namespace bridge_stg {
namespace {

// Sixteen bytes that take every third byte of 48, from the vector `part` of three.
__m128i every_third(int channel, int part) {
  alignas(16) uint8_t index[16];
  for (int x = 0; x < 16; ++x) {
    const int source = 3 * x + channel - 16 * part;
    index[x] = source >= 0 && source < 16 ? static_cast<uint8_t>(source) : 0x80;
  }
  return _mm_load_si128(reinterpret_cast<const __m128i*>(index));
}

void split(const uint8_t* in, int64_t width, uint8_t* const out[3]) {
  __m128i index[3][3];
  for (int c = 0; c < 3; ++c) {
    for (int part = 0; part < 3; ++part) index[c][part] = every_third(c, part);
  }
  int64_t x = 0;
  for (; x + 16 <= width; x += 16) {
    const __m128i* pixels = reinterpret_cast<const __m128i*>(in + 3 * x);
    const __m128i a = _mm_loadu_si128(pixels), b = _mm_loadu_si128(pixels + 1), d = _mm_loadu_si128(pixels + 2);
    for (int c = 0; c < 3; ++c) {
      const __m128i plane = _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(a, index[c][0]), _mm_shuffle_epi8(b, index[c][1])),
                                         _mm_shuffle_epi8(d, index[c][2]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out[c] + x), plane);
    }
  }
  for (; x < width; ++x) {
    for (int c = 0; c < 3; ++c) out[c][x] = in[3 * x + c];
  }
}

// Windows of 4 output pixels in loads of 16 bytes; two windows a vector.
HorizontalPlan plan(const ResizeTable& table) { return plan_windows(table, 4, 16); }

__m256i load_two(const uint8_t* low, const uint8_t* high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

template <bool kOneLoad, int kRows>
void windows(const ResizeTable& table, const HorizontalPlan& plan, const uint8_t* const* in, uint8_t* const* out) {
  const int32_t* base = reinterpret_cast<const int32_t*>(plan.base.data());
  const uint8_t* shuffles = plan.shuffle.data();
  const uint8_t* weights = plan.weights.data();
  const __m128i precision = _mm_cvtsi32_si128(table.precision);
  const __m256i half = _mm256_set1_epi32(1 << (table.precision - 1));
  const int64_t pairs = plan.pairs, shuffle_step = 16 * (kOneLoad ? pairs : 1), weight_step = 16 * pairs;
  for (int64_t window = 0; window < plan.windows; window += 2) {
    const int64_t other = window + 1 < plan.windows ? window + 1 : window;
    const uint8_t *shuffle_low = shuffles + window * shuffle_step, *shuffle_high = shuffles + other * shuffle_step;
    const uint8_t *weight_low = weights + window * weight_step, *weight_high = weights + other * weight_step;
    __m256i sums[kRows], source[kRows];
    for (int r = 0; r < kRows; ++r) {
      sums[r] = half;
      if (kOneLoad) source[r] = load_two(in[r] + base[window], in[r] + base[other]);
    }
    __m256i shuffle = load_two(shuffle_low, shuffle_high);
    for (int64_t k = 0; k < pairs; ++k) {
      if (kOneLoad) shuffle = load_two(shuffle_low + 16 * k, shuffle_high + 16 * k);
      const __m256i weight = load_two(weight_low + 16 * k, weight_high + 16 * k);
      for (int r = 0; r < kRows; ++r) {
        if (!kOneLoad) source[r] = load_two(in[r] + base[window] + 2 * k, in[r] + base[other] + 2 * k);
        sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(_mm256_shuffle_epi8(source[r], shuffle), weight));
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const __m256i wide = _mm256_sra_epi32(sums[r], precision);
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(out[r] + 4 * window), _mm_packus_epi16(words, words));
    }
  }
}

template <int kRows>
void dots(const ResizeTable& table, const HorizontalPlan& plan, const uint8_t* const* in, uint8_t* const* out) {
  const int16_t* weights = reinterpret_cast<const int16_t*>(plan.weights.data());
  const int32_t half = 1 << (table.precision - 1);
  for (int64_t i = 0; i < table.out; ++i, weights += plan.padded_taps) {
    __m256i sums[kRows];
    for (int r = 0; r < kRows; ++r) sums[r] = _mm256_setzero_si256();
    for (int64_t j = 0; j < table.count[i]; j += 16) {
      const __m256i weight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + j));
      for (int r = 0; r < kRows; ++r) {
        const __m128i pixels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in[r] + table.start[i] + j));
        sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(_mm256_cvtepu8_epi16(pixels), weight));
      }
    }
    for (int r = 0; r < kRows; ++r) {
      __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums[r]), _mm256_extracti128_si256(sums[r], 1));
      sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
      sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
      const int32_t value = (_mm_cvtsi128_si32(sum) + half) >> table.precision;
      out[r][i] = static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
    }
  }
}

template <int kRows>
void several(const ResizeTable& table, const HorizontalPlan& plan, const uint8_t* const* in, uint8_t* const* out) {
  switch (plan.kind) {
    case HorizontalPlan::Kind::kOneLoad:
      return windows<true, kRows>(table, plan, in, out);
    case HorizontalPlan::Kind::kPairLoad:
      return windows<false, kRows>(table, plan, in, out);
    default:
      return dots<kRows>(table, plan, in, out);
  }
}

void horizontal(const ResizeTable& table, const HorizontalPlan& plan, const uint8_t* const* in, uint8_t* const* out,
                int64_t rows) {
  for (; rows >= 4; rows -= 4, in += 4, out += 4) several<4>(table, plan, in, out);
  for (; rows > 0; --rows, ++in, ++out) several<1>(table, plan, in, out);
}

void vertical(const int16_t* weights, int64_t count, int precision, const uint8_t* const* rows, int64_t width,
              uint8_t* out) {
  const __m128i shift = _mm_cvtsi32_si128(precision);
  const __m256i half = _mm256_set1_epi32(1 << (precision - 1)), zero = _mm256_setzero_si256();
  for (int64_t x = 0; x < width; x += 32) {
    __m256i sums[4] = {half, half, half, half};
    for (int64_t j = 0; j < count; j += 2) {
      const bool paired = j + 1 < count;
      const uint32_t second = paired ? static_cast<uint16_t>(weights[j + 1]) : 0u;
      const __m256i weight = _mm256_set1_epi32(static_cast<int32_t>(static_cast<uint16_t>(weights[j]) | second << 16));
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[j] + x));
      const __m256i b = paired ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[j + 1] + x)) : zero;
      const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
      sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), weight));
      sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), weight));
      sums[2] = _mm256_add_epi32(sums[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), weight));
      sums[3] = _mm256_add_epi32(sums[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), weight));
    }
    for (__m256i& sum : sums) sum = _mm256_sra_epi32(sum, shift);
    // The packs undo the unpacks lane by lane.
    const __m256i pixels =
        _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + x), pixels);
  }
}

struct Constants {
  __m256 mean, std, reciprocal;
};

__m256 eight_values(const uint8_t* in, const Constants& channel) {
  const __m256i pixels = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(in)));
  const __m256 x = _mm256_sub_ps(_mm256_cvtepi32_ps(pixels), channel.mean);
  const __m256 quotient = _mm256_mul_ps(x, channel.reciprocal);
  return _mm256_fmadd_ps(_mm256_fnmadd_ps(quotient, channel.std, x), channel.reciprocal, quotient);
}

// To the high half of each lane, rounded to nearest even; values are finite.
__m256i bfloat16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
}

void normalize(const Normalization& normalization, int channel, const uint8_t* in, int64_t count, void* out,
               bool stream) {
  if (!normalization.reciprocal_is_exact) return kScalarRows.normalize(normalization, channel, in, count, out, stream);
  const Channel& table = normalization.channel[channel];
  const Constants constants = {_mm256_set1_ps(table.mean), _mm256_set1_ps(table.std), _mm256_set1_ps(table.reciprocal)};
  int64_t i = 0;
  if (normalization.type == PixelType::kFloat32) {
    float* values = static_cast<float*>(out);
    if (stream) {
      for (; i < count && reinterpret_cast<uintptr_t>(values + i) % 32 != 0; ++i) values[i] = table.value[in[i]];
      for (; i + 8 <= count; i += 8) _mm256_stream_ps(values + i, eight_values(in + i, constants));
    } else {
      for (; i + 8 <= count; i += 8) _mm256_storeu_ps(values + i, eight_values(in + i, constants));
    }
    for (; i < count; ++i) values[i] = table.value[in[i]];
    return;
  }
  uint16_t* values = static_cast<uint16_t*>(out);
  const bool brain = normalization.type == PixelType::kBFloat16;
  for (; i + 16 <= count; i += 16) {
    const __m256 low = eight_values(in + i, constants), high = eight_values(in + i + 8, constants);
    __m256i packed;
    if (brain) {
      packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bfloat16(low), bfloat16(high)), 0xd8);
    } else {
      packed = _mm256_set_m128i(_mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT),
                                _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + i), packed);
  }
  for (; i < count; ++i) values[i] = table.half[in[i]];
}

}  // namespace

const RowKernels kAvx2Rows = {split, plan, horizontal, vertical, normalize};

}  // namespace bridge_stg
