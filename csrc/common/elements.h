// The element types of tensors that kernels compute on in float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/half.h"

namespace bridge_stg {

enum class ElementType { kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline int64_t element_size(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
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
