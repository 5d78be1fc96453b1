#include "patchify_frames/resize_tables.h"

#include <algorithm>
#include <cmath>

namespace bridge_stg {
namespace {

double cubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * a;
  return 0.0;
}

double triangle(double x) {
  x = std::abs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

}  // namespace

ResizeTable make_resize_table(int64_t in, int64_t out, Interpolation interpolation) {
  const bool bicubic = interpolation == Interpolation::kBicubic;
  const double scale = static_cast<double>(in) / static_cast<double>(out);
  const double stretch = std::max(scale, 1.0);
  const double support = (bicubic ? 2.0 : 1.0) * stretch;
  ResizeTable table;
  table.in = in;
  table.out = out;
  table.taps = static_cast<int64_t>(std::ceil(support)) * 2 + 1;
  table.start.resize(out);
  table.count.resize(out);
  std::vector<double> weights(out * table.taps, 0.0);
  double largest = 0.0;
  for (int64_t i = 0; i < out; ++i) {
    const double center = scale * (static_cast<double>(i) + 0.5);
    const int64_t first = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
    const int64_t last = std::min<int64_t>(static_cast<int64_t>(center + support + 0.5), in);
    const int64_t count = std::clamp<int64_t>(last - first, 0, table.taps);
    double* row = weights.data() + i * table.taps;
    double total = 0.0;
    for (int64_t j = 0; j < count; ++j) {
      const double x = (static_cast<double>(j + first) - center + 0.5) * (1.0 / stretch);
      row[j] = bicubic ? cubic(x) : triangle(x);
      total += row[j];
    }
    for (int64_t j = 0; j < count; ++j) {
      if (total != 0.0) row[j] /= total;
      largest = std::max(largest, row[j]);
    }
    table.start[i] = static_cast<int32_t>(first);
    table.count[i] = static_cast<int32_t>(count);
  }
  for (table.precision = 0; table.precision < 22; ++table.precision) {
    if (static_cast<int>(0.5 + largest * (1 << (table.precision + 1))) >= (1 << 15)) break;
  }
  table.weights.resize(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const double scaled = weights[i] * (1 << table.precision);
    table.weights[i] = static_cast<int16_t>(static_cast<int>(scaled < 0 ? scaled - 0.5 : scaled + 0.5));
  }
  return table;
}

}  // namespace bridge_stg
