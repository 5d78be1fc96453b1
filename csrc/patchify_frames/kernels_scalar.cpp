// Rows of pixels without SIMD, and the plans of the vector levels.
#include <algorithm>

#include "patchify_frames/kernels.h"

namespace bridge_stg {
namespace {

uint8_t clamp_pixel(int32_t value) { return static_cast<uint8_t>(std::clamp(value, 0, 255)); }

void split(const uint8_t* in, int64_t width, uint8_t* const out[3]) {
  for (int64_t x = 0; x < width; ++x) {
    for (int c = 0; c < 3; ++c) out[c][x] = in[3 * x + c];
  }
}

HorizontalPlan plan(const ResizeTable&) { return {}; }

void horizontal(const ResizeTable& table, const HorizontalPlan&, const uint8_t* const* in, uint8_t* const* out,
                int64_t rows) {
  const int32_t half = 1 << (table.precision - 1);
  for (int64_t i = 0; i < table.out; ++i) {
    const int16_t* weights = table.weights.data() + i * table.taps;
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* pixels = in[r] + table.start[i];
      int32_t sum = half;
      for (int32_t j = 0; j < table.count[i]; ++j) sum += weights[j] * pixels[j];
      out[r][i] = clamp_pixel(sum >> table.precision);
    }
  }
}

void vertical(const int16_t* weights, int64_t count, int precision, const uint8_t* const* rows, int64_t width,
              uint8_t* out) {
  constexpr int64_t kChunk = 256;
  int32_t sums[kChunk];
  for (int64_t first = 0; first < width; first += kChunk) {
    const int64_t columns = std::min(kChunk, width - first);
    std::fill_n(sums, columns, 1 << (precision - 1));
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t x = 0; x < columns; ++x) sums[x] += weights[j] * rows[j][first + x];
    }
    for (int64_t x = 0; x < columns; ++x) out[first + x] = clamp_pixel(sums[x] >> precision);
  }
}

void normalize(const Normalization& normalization, int channel, const uint8_t* in, int64_t count, void* out, bool) {
  const Channel& table = normalization.channel[channel];
  if (normalization.type == PixelType::kFloat32) {
    float* values = static_cast<float*>(out);
    for (int64_t i = 0; i < count; ++i) values[i] = table.value[in[i]];
  } else {
    uint16_t* values = static_cast<uint16_t*>(out);
    for (int64_t i = 0; i < count; ++i) values[i] = table.half[in[i]];
  }
}

HorizontalPlan plan_dot(const ResizeTable& table) {
  HorizontalPlan plan;
  plan.kind = HorizontalPlan::Kind::kDot;
  plan.padded_taps = round_up(table.taps, 16);
  plan.weights = AlignedBytes(table.out * plan.padded_taps * 2);
  int16_t* weights = reinterpret_cast<int16_t*>(plan.weights.data());
  for (int64_t i = 0; i < table.out; ++i) {
    std::copy_n(table.weights.data() + i * table.taps, table.count[i], weights + i * plan.padded_taps);
  }
  return plan;
}

}  // namespace

HorizontalPlan plan_windows(const ResizeTable& table, int64_t outputs, int64_t bytes) {
  HorizontalPlan plan;
  plan.windows = (table.out + outputs - 1) / outputs;
  int64_t taps = 1, spread = 0, reach = 0;  // of starts in a window; of taps from the window's first start
  for (int64_t i = 0; i < table.out; ++i) {
    const int32_t base = table.start[i / outputs * outputs];
    taps = std::max<int64_t>(taps, table.count[i]);
    spread = std::max<int64_t>(spread, table.start[i] - base);
    reach = std::max<int64_t>(reach, table.start[i] - base + table.count[i]);
  }
  plan.pairs = (taps + 1) / 2;
  if (reach <= bytes) {
    plan.kind = HorizontalPlan::Kind::kOneLoad;
  } else if (spread + 2 <= bytes) {
    plan.kind = HorizontalPlan::Kind::kPairLoad;
  } else {
    return plan_dot(table);
  }
  const bool one_load = plan.kind == HorizontalPlan::Kind::kOneLoad;
  const int64_t shuffles = one_load ? plan.pairs : 1;
  plan.base = AlignedBytes(plan.windows * 4);
  plan.shuffle = AlignedBytes(plan.windows * shuffles * 4 * outputs);
  plan.weights = AlignedBytes(plan.windows * plan.pairs * 4 * outputs);
  std::fill_n(plan.shuffle.data(), plan.windows * shuffles * 4 * outputs, uint8_t{0x80});
  int32_t* bases = reinterpret_cast<int32_t*>(plan.base.data());
  int16_t* weights = reinterpret_cast<int16_t*>(plan.weights.data());
  for (int64_t i = 0; i < table.out; ++i) {
    const int64_t window = i / outputs, lane = i % outputs;
    if (lane == 0) bases[window] = table.start[i];
    const int32_t offset = table.start[i] - bases[window];
    for (int32_t j = 0; j < 2 * plan.pairs; ++j) {
      if (j < table.count[i]) {
        weights[((window * plan.pairs + j / 2) * outputs + lane) * 2 + j % 2] = table.weights[i * table.taps + j];
      }
      if (one_load ? j < table.count[i] : j < 2) {
        const int64_t shuffle = one_load ? window * plan.pairs + j / 2 : window;
        plan.shuffle.data()[(shuffle * outputs + lane) * 4 + 2 * (j % 2)] =
            static_cast<uint8_t>(offset + (one_load ? j : j % 2));
      }
    }
  }
  return plan;
}

const RowKernels kScalarRows = {split, plan, horizontal, vertical, normalize};

}  // namespace bridge_stg
