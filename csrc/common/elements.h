// The element types of tensors. Kernels compute in float32; the casts round to nearest, ties to even, as torch does.
#pragma once

#include <cstdint>
#include <cstring>

namespace bridge_stg {

enum class ElementType { kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline int64_t element_size(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

// Calls work(T{}) with the C++ type of the elements.
template <typename Work>
void with_element(ElementType type, const Work& work) {
  switch (type) {
    case ElementType::kFloat32:
      return work(float{});
    case ElementType::kBFloat16:
      return work(BFloat16{});
    case ElementType::kFloat16:
      return work(Float16{});
  }
}

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
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
  if (magnitude > 0x7f800000u) return sign | 0x7e00;   // NaN
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

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude < 0x400u) {  // subnormal steps of 2^-24
    const float small = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -small : small;
  }
  return float_from_bits(sign | ((magnitude << 13) + 0x38000000u));
}

inline void from_float(float value, float* out) { *out = value; }

inline void from_float(float value, BFloat16* out) { out->bits = to_bfloat16(value); }

inline void from_float(float value, Float16* out) { out->bits = to_float16(value); }

}  // namespace bridge_stg
