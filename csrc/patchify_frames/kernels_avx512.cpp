// Rows of pixels with AVX-512 F, BW, VL, DQ and VBMI. Nothing but these kernels may be compiled with these flags: an
// inline function of a shared header, emitted here, could be what other files are linked to.
#include <immintrin.h>

#include "patchify_frames/kernels.h"

namespace bridge_stg {
namespace {

void split(const uint8_t* in, int64_t width, uint8_t* const out[3]) {
  // Of 64 pixels in three vectors, those of one channel: bytes 0..127 from the first two, the rest from the third.
  alignas(64) uint8_t index[3][64];
  __mmask64 from_third[3];
  for (int c = 0; c < 3; ++c) {
    from_third[c] = 0;
    for (int x = 0; x < 64; ++x) {
      const int source = 3 * x + c;
      index[c][x] = static_cast<uint8_t>(source & 127);
      if (source >= 128) from_third[c] |= __mmask64{1} << x;
    }
  }
  int64_t x = 0;
  for (; x + 64 <= width; x += 64) {
    const __m512i a = _mm512_loadu_si512(in + 3 * x), b = _mm512_loadu_si512(in + 3 * x + 64),
                  d = _mm512_loadu_si512(in + 3 * x + 128);
    for (int c = 0; c < 3; ++c) {
      const __m512i chosen = _mm512_load_si512(index[c]);
      const __m512i plane = _mm512_permutex2var_epi8(a, chosen, b);
      _mm512_storeu_si512(out[c] + x, _mm512_mask_permutexvar_epi8(plane, from_third[c], chosen, d));
    }
  }
  for (; x < width; ++x) {
    for (int c = 0; c < 3; ++c) out[c][x] = in[3 * x + c];
  }
}

// Windows of 16 output pixels in loads of 64 bytes; wider filters as AVX2 does them.
HorizontalPlan plan(const ResizeTable& table) { return plan_windows(table, 16, 64); }

template <bool kOneLoad, int kRows>
void windows(const ResizeTable& table, const HorizontalPlan& plan, const uint8_t* const* in, uint8_t* const* out) {
  constexpr __mmask64 kLowBytes = 0x5555555555555555;
  const int32_t* base = reinterpret_cast<const int32_t*>(plan.base.data());
  const uint8_t* shuffles = plan.shuffle.data();
  const uint8_t* weights = plan.weights.data();
  const __m128i precision = _mm_cvtsi32_si128(table.precision);
  const __m512i half = _mm512_set1_epi32(1 << (table.precision - 1)), zero = _mm512_setzero_si512();
  for (int64_t window = 0; window < plan.windows; ++window) {
    __m512i sums[kRows], source[kRows];
    for (int r = 0; r < kRows; ++r) {
      sums[r] = half;
      if (kOneLoad) source[r] = _mm512_loadu_si512(in[r] + base[window]);
    }
    __m512i shuffle = _mm512_load_si512(shuffles);
    for (int64_t k = 0; k < plan.pairs; ++k, weights += 64) {
      if (kOneLoad) shuffle = _mm512_load_si512(shuffles + 64 * k);
      const __m512i weight = _mm512_load_si512(weights);
      for (int r = 0; r < kRows; ++r) {
        if (!kOneLoad) source[r] = _mm512_loadu_si512(in[r] + base[window] + 2 * k);
        const __m512i taps = _mm512_maskz_permutexvar_epi8(kLowBytes, shuffle, source[r]);
        sums[r] = _mm512_add_epi32(sums[r], _mm512_madd_epi16(taps, weight));
      }
    }
    shuffles += 64 * (kOneLoad ? plan.pairs : 1);
    for (int r = 0; r < kRows; ++r) {
      const __m512i wide = _mm512_max_epi32(_mm512_sra_epi32(sums[r], precision), zero);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out[r] + 16 * window), _mm512_cvtusepi32_epi8(wide));
    }
  }
}

template <int kRows>
void several(const ResizeTable& table, const HorizontalPlan& plan, const uint8_t* const* in, uint8_t* const* out) {
  if (plan.kind == HorizontalPlan::Kind::kOneLoad) return windows<true, kRows>(table, plan, in, out);
  return windows<false, kRows>(table, plan, in, out);
}

void horizontal(const ResizeTable& table, const HorizontalPlan& plan, const uint8_t* const* in, uint8_t* const* out,
                int64_t rows) {
  if (plan.kind == HorizontalPlan::Kind::kDot) return kAvx2Rows.horizontal(table, plan, in, out, rows);
  for (; rows >= 4; rows -= 4, in += 4, out += 4) several<4>(table, plan, in, out);
  for (; rows > 0; --rows, ++in, ++out) several<1>(table, plan, in, out);
}

void vertical(const int16_t* weights, int64_t count, int precision, const uint8_t* const* rows, int64_t width,
              uint8_t* out) {
  const __m128i shift = _mm_cvtsi32_si128(precision);
  const __m512i half = _mm512_set1_epi32(1 << (precision - 1)), zero = _mm512_setzero_si512();
  for (int64_t x = 0; x < width; x += 64) {
    __m512i sums[4] = {half, half, half, half};
    for (int64_t j = 0; j < count; j += 2) {
      const bool paired = j + 1 < count;
      const uint32_t second = paired ? static_cast<uint16_t>(weights[j + 1]) : 0u;
      const __m512i weight = _mm512_set1_epi32(static_cast<int32_t>(static_cast<uint16_t>(weights[j]) | second << 16));
      const __m512i a = _mm512_loadu_si512(rows[j] + x), b = paired ? _mm512_loadu_si512(rows[j + 1] + x) : zero;
      const __m512i low = _mm512_unpacklo_epi8(a, b), high = _mm512_unpackhi_epi8(a, b);
      sums[0] = _mm512_add_epi32(sums[0], _mm512_madd_epi16(_mm512_unpacklo_epi8(low, zero), weight));
      sums[1] = _mm512_add_epi32(sums[1], _mm512_madd_epi16(_mm512_unpackhi_epi8(low, zero), weight));
      sums[2] = _mm512_add_epi32(sums[2], _mm512_madd_epi16(_mm512_unpacklo_epi8(high, zero), weight));
      sums[3] = _mm512_add_epi32(sums[3], _mm512_madd_epi16(_mm512_unpackhi_epi8(high, zero), weight));
    }
    for (__m512i& sum : sums) sum = _mm512_sra_epi32(sum, shift);
    // The packs undo the unpacks lane by lane.
    const __m512i pixels =
        _mm512_packus_epi16(_mm512_packs_epi32(sums[0], sums[1]), _mm512_packs_epi32(sums[2], sums[3]));
    _mm512_storeu_si512(out + x, pixels);
  }
}

struct Constants {
  __m512 mean, std, reciprocal;
};

__m512 sixteen_values(__m128i pixels, const Constants& channel) {
  const __m512 x = _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(pixels)), channel.mean);
  const __m512 quotient = _mm512_mul_ps(x, channel.reciprocal);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(quotient, channel.std, x), channel.reciprocal, quotient);
}

__m128i sixteen_pixels(const uint8_t* in) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(in)); }

// Rounded to nearest even; values are finite.
__m256i bfloat16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

void normalize(const Normalization& normalization, int channel, const uint8_t* in, int64_t count, void* out,
               bool stream) {
  if (!normalization.reciprocal_is_exact) return kScalarRows.normalize(normalization, channel, in, count, out, stream);
  const Channel& table = normalization.channel[channel];
  const Constants constants = {_mm512_set1_ps(table.mean), _mm512_set1_ps(table.std), _mm512_set1_ps(table.reciprocal)};
  int64_t i = 0;
  if (normalization.type == PixelType::kFloat32) {
    float* values = static_cast<float*>(out);
    if (stream) {
      const int64_t head = static_cast<int64_t>((64 - reinterpret_cast<uintptr_t>(values) % 64) % 64 / 4);
      if (head > 0) {
        const __mmask16 mask = static_cast<__mmask16>((1u << (head < count ? head : count)) - 1u);
        _mm512_mask_storeu_ps(values, mask, sixteen_values(sixteen_pixels(in), constants));
        i = head;
      }
      for (; i + 16 <= count; i += 16) {
        _mm512_stream_ps(values + i, sixteen_values(sixteen_pixels(in + i), constants));
      }
    } else {
      for (; i + 16 <= count; i += 16) {
        _mm512_storeu_ps(values + i, sixteen_values(sixteen_pixels(in + i), constants));
      }
    }
    if (i < count) {
      const __mmask16 mask = static_cast<__mmask16>((1u << (count - i)) - 1u);
      _mm512_mask_storeu_ps(values + i, mask, sixteen_values(sixteen_pixels(in + i), constants));
    }
    return;
  }
  uint16_t* values = static_cast<uint16_t*>(out);
  const bool brain = normalization.type == PixelType::kBFloat16;
  for (; i < count; i += 16) {
    const __m512 wide = sixteen_values(sixteen_pixels(in + i), constants);
    const __m256i packed = brain ? bfloat16(wide) : _mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT);
    const __mmask16 mask = count - i < 16 ? static_cast<__mmask16>((1u << (count - i)) - 1u) : __mmask16{0xffff};
    _mm256_mask_storeu_epi16(values + i, mask, packed);
  }
}

}  // namespace

const RowKernels kAvx512Rows = {split, plan, horizontal, vertical, normalize};

}  // namespace bridge_stg
