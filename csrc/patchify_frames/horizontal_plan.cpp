#include "patchify_frames/horizontal_plan.h"

#include <algorithm>

namespace bridge_stg {
namespace {

HorizontalPlan dot_plan(const ResizeTable& table) {
  HorizontalPlan plan;
  plan.padded_taps = round_up(table.taps, kDotTaps);
  plan.weights = AlignedBytes(table.out * plan.padded_taps * 2);
  int16_t* weights = reinterpret_cast<int16_t*>(plan.weights.data());
  for (int64_t i = 0; i < table.out; ++i) {
    std::copy_n(table.weights.data() + i * table.taps, table.count[i], weights + i * plan.padded_taps);
  }
  return plan;
}

}  // namespace

HorizontalPlan make_plan(const ResizeTable& table, const VectorShape& shape) {
  if (shape.lanes == 0) return dot_plan(table);
  const int64_t outputs = shape.lanes * shape.outputs;
  HorizontalPlan plan;
  plan.windows = ceil_div(table.out, outputs);
  int64_t taps = 1, spread = 0, reach = 0;  // of the starts in a lane, and of its taps, from the lane's first start
  for (int64_t i = 0; i < table.out; ++i) {
    const int32_t base = table.start[i / shape.outputs * shape.outputs];
    taps = std::max<int64_t>(taps, table.count[i]);
    spread = std::max<int64_t>(spread, table.start[i] - base);
    reach = std::max<int64_t>(reach, table.start[i] - base + table.count[i]);
  }
  if (reach > shape.bytes && spread + 2 > shape.bytes) return dot_plan(table);
  const bool one_load = reach <= shape.bytes;
  plan.kind = one_load ? HorizontalPlan::Kind::kOneLoad : HorizontalPlan::Kind::kPairLoad;
  plan.pairs = ceil_div(taps, 2);
  const int64_t shuffles = one_load ? plan.pairs : 1;
  plan.base = AlignedBytes(plan.windows * shape.lanes * 4);
  plan.shuffle = AlignedBytes(plan.windows * shuffles * 4 * outputs);
  plan.weights = AlignedBytes(plan.windows * plan.pairs * 4 * outputs);
  std::fill_n(plan.shuffle.data(), plan.windows * shuffles * 4 * outputs, uint8_t{0x80});
  int32_t* bases = reinterpret_cast<int32_t*>(plan.base.data());
  int16_t* weights = reinterpret_cast<int16_t*>(plan.weights.data());
  for (int64_t i = 0; i < table.out; ++i) {
    const int64_t window = i / outputs, place = i % outputs, lane = i / shape.outputs;
    if (i % shape.outputs == 0) bases[lane] = table.start[i];
    const int32_t offset = table.start[i] - bases[lane];
    for (int32_t j = 0; j < table.count[i]; ++j) {
      weights[((window * plan.pairs + j / 2) * outputs + place) * 2 + j % 2] = table.weights[i * table.taps + j];
    }
    for (int32_t j = 0; j < (one_load ? table.count[i] : 2); ++j) {
      const int64_t shuffle = window * shuffles + j / 2;
      plan.shuffle.data()[(shuffle * outputs + place) * 4 + 2 * (j % 2)] = static_cast<uint8_t>(offset + j);
    }
  }
  return plan;
}

}  // namespace bridge_stg
