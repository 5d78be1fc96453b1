// The kernels of prune_tokens over blocks of token rows, of which each SIMD level has a table.
#pragma once

#include <cstdint>

#include "common/cpu_features.h"
#include "common/elements.h"

namespace bridge_stg {

enum class Reduce { kMax, kMean, kLogSumExp };

// The folded queries of one segment in float32, each padded with zeros to `stride` floats, a multiple of 16.
struct QueryRows {
  const float* data;
  int64_t count, width, stride;
};

struct Scoring {
  bool cosine;
  Reduce reduce;
};

// A block of rows of one segment for the backward. `grad` is the gradient of a row's score, and `live` is false for
// masked rows, whose score has no gradient.
constexpr int64_t kRowBlock = 64;
struct BackwardBlock {
  int64_t count;
  const void* rows[kRowBlock];
  const void* extra[kRowBlock];  // gradient to add, or null
  void* out[kRowBlock];          // gradient of the row, or null
  float grad[kRowBlock];
  bool live[kRowBlock];
};

struct PruneKernels {
  // Scores of `count` rows, `row_stride` elements apart. `scratch` holds kRowBlock floats a query, on a cache line.
  void (*score)(ElementType type, const void* rows, int64_t row_stride, int64_t count, const QueryRows& queries,
                const Scoring& scoring, float* scores, float* scratch);
  // Writes the gradients of the rows, and adds to those of the queries, [queries.count, queries.stride], or null.
  // `scratch` as above.
  void (*backward)(ElementType type, const BackwardBlock& block, const QueryRows& queries, const Scoring& scoring,
                   float scale, float* d_queries, float* scratch);
  // How many keys are >= bound.
  int64_t (*count_at_least)(const int32_t* keys, int64_t count, int32_t bound);
};

template <>
const PruneKernels KernelsOf<PruneKernels>::scalar;
template <>
const PruneKernels KernelsOf<PruneKernels>::avx2;
template <>
const PruneKernels KernelsOf<PruneKernels>::avx512;

}  // namespace bridge_stg
