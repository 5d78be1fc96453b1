// What prune_tokens does to blocks of token rows, once for each SIMD level.
#pragma once

#include <cstdint>

#include "common/cpu_features.h"
#include "common/elements.h"

namespace bridge_stg {

enum class Reduce { kMax, kMean, kLogSumExp };

// The queries of one segment in float32, each row padded with zeros to `stride`, a multiple of 16. The mean is one
// query.
struct QueryRows {
  const float* data;
  int64_t count, width, stride;
};

struct Scoring {
  bool cosine;
  Reduce reduce;
};

// Rows of one segment on their way back. `grad` is the gradient of a row's score; `live` is false for rows that the
// score does not reach.
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

extern const PruneKernels kScalarPrune;
#if defined(__x86_64__)
extern const PruneKernels kAvx2Prune;
extern const PruneKernels kAvx512Prune;
#endif

inline const PruneKernels& prune_kernels(SimdLevel level) {
#if defined(__x86_64__)
  if (level == SimdLevel::kAvx512) return kAvx512Prune;
  if (level == SimdLevel::kAvx2) return kAvx2Prune;
#endif
  (void)level;
  return kScalarPrune;
}

}  // namespace bridge_stg
