#include "prune_tokens/select.h"

#include <algorithm>

namespace bridge_stg {

void select_highest(const int32_t* keys, int64_t count, int64_t keep, CountAtLeast count_at_least, int64_t* positions) {
  // Bisect for the highest bound that at least `keep` keys reach; it always lies in [low, high).
  const auto [lowest, highest] = std::minmax_element(keys, keys + count);
  int64_t low = *lowest, high = int64_t{*highest} + 1, reach_low = count;
  while (high - low > 1 && reach_low != keep) {
    const int64_t middle = low + (high - low) / 2;
    const int64_t reach = count_at_least(keys, count, static_cast<int32_t>(middle));
    if (reach >= keep) {
      low = middle;
      reach_low = reach;
    } else {
      high = middle;
    }
  }
  const int32_t bound = static_cast<int32_t>(low);
  int64_t ties = keep;  // how many keys that equal the bound are taken
  if (reach_low != keep) ties -= bound == INT32_MAX ? 0 : count_at_least(keys, count, bound + 1);
  for (int64_t i = 0, taken = 0; taken < keep; ++i) {
    positions[taken] = i;
    const bool tie = (keys[i] == bound) & (ties > 0);
    ties -= tie;
    taken += (keys[i] > bound) | tie;
  }
}

}  // namespace bridge_stg
