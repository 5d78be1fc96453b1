// The kernels of attend_memory over blocks of float32, of which each SIMD level has a table.
//
// A block [keys, stride] holds scores or probabilities: a row for each key, a column for each query row. `stride` is a
// multiple of kColumns. So every product reads the memory as it lies, and the softmax goes down the columns.
#pragma once

#include <cstdint>

#include "common/aligned_bytes.h"
#include "common/cpu_features.h"
#include "common/elements.h"

namespace bridge_stg {

// The columns of a block are padded to a multiple of the widest vector.
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

// A block of scores, of probabilities or of their gradients.
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
  // Adds key_bias[k] to row k, unless `key_bias` is null; then peak = max(peak, column).
  void (*peaks)(const Block& score, const float* key_bias, float* peak);
  // score = exp(score - peak), where a peak of -inf counts as 0; then total = total + sum of column.
  void (*exponentials)(const Block& score, const float* peak, float* total);
  // column *= factor.
  void (*scale)(const Block& block, const float* factor);
  // factor = exp(from - to) for `count` columns, where a `to` of -inf counts as 0.
  void (*decay)(const float* from, const float* to, int64_t count, float* factor);
  // total = total + sum over keys of p * dp.
  void (*weighted_sums)(const Block& p, const float* dp, float* total);
  // ds = factor * p * (dp - delta), in place of dp; row_sums[k] = sum over its first `rows` columns of
  // p * (dp - delta), unless null.
  void (*score_gradient)(const Block& p, float* dp, const float* delta, float factor, int64_t rows, float* row_sums);
  // sums[k] = sum of the first `rows` columns.
  void (*row_sums)(const Block& block, int64_t rows, float* sums);
};

template <>
const AttendKernels KernelsOf<AttendKernels>::scalar;
template <>
const AttendKernels KernelsOf<AttendKernels>::avx2;
template <>
const AttendKernels KernelsOf<AttendKernels>::avx512;

}  // namespace bridge_stg
