#include "patchify_frames/normalization.h"

#include <cmath>

namespace bridge_stg {

Normalization make_normalization(const double mean[3], const double std[3], double rescale_factor, ElementType type) {
  const float scale = static_cast<float>(1.0 / rescale_factor);
  Normalization result;
  result.type = type;
  result.reciprocal_is_exact = true;
  for (int c = 0; c < 3; ++c) {
    Channel& channel = result.channel[c];
    channel.mean = static_cast<float>(mean[c]) * scale;
    channel.std = static_cast<float>(std[c]) * scale;
    channel.reciprocal = 1.0f / channel.std;
    for (int pixel = 0; pixel < 256; ++pixel) {
      const float x = static_cast<float>(pixel) - channel.mean;
      const float value = x / channel.std;
      float quotient = x * channel.reciprocal;
      quotient = std::fma(std::fma(-quotient, channel.std, x), channel.reciprocal, quotient);
      result.reciprocal_is_exact &= float_bits(quotient) == float_bits(value);
      channel.value[pixel] = value;
      channel.half[pixel] = type == ElementType::kBFloat16 ? to_bfloat16(value) : to_float16(value);
    }
  }
  return result;
}

}  // namespace bridge_stg
