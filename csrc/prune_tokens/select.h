// The selection of prune_tokens: exactly `keep` of the scores by one total order, in ascending position.
#pragma once

#include <cstdint>

#include "common/half.h"

namespace bridge_stg {

// Keys that sort as the scores do: best highest, +0 equal to -0. Below every score come unmasked NaN, below them the
// masked.
constexpr int32_t kMaskedKey = INT32_MIN, kNanKey = INT32_MIN + 1;

inline int32_t order_key(float score) {
  const int32_t bits = static_cast<int32_t>(float_bits(score + 0.0f));
  return score != score ? kNanKey : bits ^ ((bits >> 31) & 0x7fffffff);
}

using CountAtLeast = int64_t (*)(const int32_t* keys, int64_t count, int32_t bound);

// Writes the ascending positions of the `keep` (1..count) highest keys; of equal keys the lowest positions are taken.
void select_highest(const int32_t* keys, int64_t count, int64_t keep, CountAtLeast count_at_least, int64_t* positions);

}  // namespace bridge_stg
