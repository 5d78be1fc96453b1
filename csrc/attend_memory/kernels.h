// What attend_memory does to blocks of float32, once for each SIMD level.
//
// Scores and probabilities are held with keys as rows: block [keys, stride], a column for each query row, `stride` a
// multiple of kColumns. So every product reads the memory as it lies, and a softmax goes down columns.
#pragma once

#include <cstdint>

#include "common/aligned_bytes.h"
#include "common/cpu_features.h"
#include "common/elements.h"

namespace bridge_stg {

// Columns of a block come in multiples of the widest vector.
constexpr int64_t kColumns = 16;

// c[i, j] = start + sum_k a[i * a_row + k * a_step] * b[k * b_step + j], where start is 0, c[i, j], or keep[i] c[i, j].
struct Product {
  int64_t rows, columns, steps;
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_step;
  float* c;
  int64_t c_row;
  bool add;           // start from c
  const float* keep;  // factors of c, or null for 1
};

// A block of scores or of what follows from them.
struct Block {
  float* data;
  int64_t keys, columns, stride;
};

struct AttendKernels {
  void (*product)(const Product& product);
  // to[c * to_stride + r] = factor * from[r * from_stride + c]; columns rows..round_up(rows, kColumns) become zero.
  void (*transpose)(const float* from, int64_t from_stride, int64_t rows, int64_t width, float factor, float* to,
                    int64_t to_stride);
  // to = from + extra in float32; extra of the type of `from`, or null.
  void (*widen)(ElementType type, const void* from, const void* extra, int64_t count, float* to);
  // to = factor * from in `type`.
  void (*narrow)(const float* from, float factor, int64_t count, ElementType type, void* to);
  // Adds key_bias[k], unless null, to row k; peak = max(peak, column).
  void (*peaks)(const Block& score, const float* key_bias, float* peak);
  // score = exp(score - peak), with 0 in place of a peak of -inf; total = total + sum of column.
  void (*exponentials)(const Block& score, const float* peak, float* total);
  // column *= factor.
  void (*scale)(const Block& block, const float* factor);
  // factor = exp(from - to) for `count` columns, with 0 in place of a `to` of -inf.
  void (*decay)(const float* from, const float* to, int64_t count, float* factor);
  // total = total + sum over keys of p * dp.
  void (*weighted_sums)(const Block& p, const float* dp, float* total);
  // ds = factor * p * (dp - delta), in place of dp; row_sums[k] = sum over its first `rows` columns of
  // p * (dp - delta), unless null.
  void (*score_gradient)(const Block& p, float* dp, const float* delta, float factor, int64_t rows, float* row_sums);
  // sums[k] = sum of the first `rows` columns.
  void (*row_sums)(const Block& block, int64_t rows, float* sums);
};

extern const AttendKernels kScalarAttend;
#if defined(__x86_64__)
extern const AttendKernels kAvx2Attend;
extern const AttendKernels kAvx512Attend;
#endif

inline const AttendKernels& attend_kernels(SimdLevel level) {
#if defined(__x86_64__)
  if (level == SimdLevel::kAvx512) return kAvx512Attend;
  if (level == SimdLevel::kAvx2) return kAvx2Attend;
#endif
  (void)level;
  return kScalarAttend;
}

}  // namespace bridge_stg
