// Functions of vectors, on top of the simd_*.h that was included before.
#pragma once

namespace bridge_stg {
namespace {

// exp(x) for x <= 88, within 2 units in the last place; 0 below the normal numbers, NaN for NaN.
// Cody-Waite reduction by ln 2 and the polynomial of Cephes' expf.
inline Vec exponential(Vec x) {
  const Vec lowest = splat(-87.33654f);
  const Vec n = round_to_even(maximum(lowest, x) * splat(1.44269504f));
  const Vec r = multiply_add(n, splat(2.12194440e-4f), multiply_add(n, splat(-0.693359375f), x));
  Vec p = splat(1.9875691500e-4f);
  p = multiply_add(p, r, splat(1.3981999507e-3f));
  p = multiply_add(p, r, splat(8.3334519073e-3f));
  p = multiply_add(p, r, splat(4.1665795894e-2f));
  p = multiply_add(p, r, splat(1.6666665459e-1f));
  p = multiply_add(p, r, splat(5.0000001201e-1f));
  p = multiply_add(p, r * r, r + splat(1.0f));
  return zero_below(p * power_of_two(n), x, lowest);
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace bridge_stg
