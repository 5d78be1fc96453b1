// (u8 - mean / rescale_factor) / (std / rescale_factor) in float32, then the cast: at most 256 values a channel.
#pragma once

#include <array>
#include <cstdint>

namespace bridge_stg {

enum class PixelType { kFloat32, kBFloat16, kFloat16 };

inline int64_t pixel_size(PixelType type) { return type == PixelType::kFloat32 ? 4 : 2; }

struct Channel {
  float mean, std, reciprocal;  // of pixels in 0..255; reciprocal = 1 / std
  std::array<float, 256> value;     // by pixel, in float32
  std::array<uint16_t, 256> half;   // the same cast to the output's dtype, where that has 16 bits
};

struct Normalization {
  PixelType type;
  // Whether, for every pixel x of every channel, q = (x - mean) reciprocal; q += fma(-q, std, x - mean) reciprocal
  // is the correctly rounded quotient. Checked value by value: no setting is taken on trust.
  bool reciprocal_is_exact;
  std::array<Channel, 3> channel;
};

// As the Hugging Face processors fuse rescaling in: float32(mean) * float32(1 / rescale_factor).
Normalization make_normalization(const double mean[3], const double std[3], double rescale_factor, PixelType type);

}  // namespace bridge_stg
