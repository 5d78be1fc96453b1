// The selection of prune_tokens: exactly `keep` tokens by one total order of the scores, in ascending position.
#pragma once

#include <cstdint>

#include "common/elements.h"

namespace bridge_stg {

// Integers that sort as the scores do; +0 equals -0. Below every score comes NaN, and below that a masked token.
constexpr int32_t kMaskedKey = INT32_MIN, kNanKey = INT32_MIN + 1;

inline int32_t order_key(float score) {
  const int32_t bits = static_cast<int32_t>(float_bits(score + 0.0f));
  return score != score ? kNanKey : bits ^ ((bits >> 31) & 0x7fffffff);
}

using CountAtLeast = int64_t (*)(const int32_t* keys, int64_t count, int32_t bound);

// Writes the ascending positions of the `keep` (1..count) highest keys; of equal keys the lowest positions are taken.
void select_highest(const int32_t* keys, int64_t count, int64_t keep, CountAtLeast count_at_least, int64_t* positions);

}  // namespace bridge_stg
