// float32 to bfloat16 and float16, rounded to nearest, ties to even, as torch casts.
#pragma once

#include <cstdint>
#include <cstring>

namespace bridge_stg {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline uint16_t to_float16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return sign | 0x7e00;  // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // rounds to 65536 or beyond
  if (magnitude < 0x38800000u) {                       // below 2^-14: subnormal steps of 2^-24
    if (magnitude <= 0x33000000u) return sign;         // at most half a step
    const uint32_t shift = 126u - (magnitude >> 23);
    const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    const uint32_t whole = mantissa >> shift, rest = mantissa & ((1u << shift) - 1u), half = 1u << (shift - 1u);
    return sign | static_cast<uint16_t>(whole + (rest > half || (rest == half && (whole & 1u))));
  }
  return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
}

}  // namespace bridge_stg
