// The values of pixels: (u8 - mean / rescale_factor) / (std / rescale_factor) in float32, then the cast to the output's
// type. A channel has at most 256 of them.
#pragma once

#include <cstdint>

#include "common/elements.h"

namespace bridge_stg {

struct Channel {
  float mean, std, reciprocal;  // of pixels in 0..255; reciprocal = 1 / std
  float value[256];             // by pixel
  uint16_t half[256];           // the bits of the same, cast to an output type of 16 bits
};

struct Normalization {
  ElementType type;
  // Whether q = (x - mean) reciprocal; q += fma(-q, std, x - mean) reciprocal gives the correctly rounded quotient for
  // every pixel x of every channel. All of them are tried.
  bool reciprocal_is_exact;
  Channel channel[3];
};

// Mean and std are rescaled as the Hugging Face processors do it: float32(mean) * float32(1 / rescale_factor).
Normalization make_normalization(const double mean[3], const double std[3], double rescale_factor, ElementType type);

}  // namespace bridge_stg
