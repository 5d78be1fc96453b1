// prune_tokens and its backward on the CPU, free of torch.
//
// The score of a row is summed in an order that depends on its width alone. Gradients of queries are summed over parts
// that are cut by shapes alone, in the order of the parts. So results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "prune_tokens/kernels.h"

namespace bridge_stg {

// Rows [segments, count, width] of tokens by strides; the elements of a row lie side by side.
struct TokenRows {
  ElementType type;
  const void* data;
  int64_t segments, count, width, segment_stride, row_stride;

  const void* row(int64_t segment, int64_t position) const {
    return static_cast<const char*>(data) + element_size(type) * (segment * segment_stride + position * row_stride);
  }
};

// Queries [segments, count, width] by strides, any of which may be 0.
struct QueryView {
  ElementType type;
  const void* data;
  int64_t count, segment_stride, query_stride, element_stride;
};

// How many queries scores are taken with: Reduce::kMean folds all to their mean.
inline int64_t folded_count(const QueryView& queries, Reduce reduce) {
  return reduce == Reduce::kMean ? 1 : queries.count;
}

// The options and the outputs of one call.
struct PruneForward {
  Scoring scoring;
  float scale;
  int64_t keep;
  const bool* mask;  // [segments, count], or null
  void* kept;        // [segments, keep, width]
  int64_t* index;    // [segments, keep]
  float* score;      // [segments, keep]
  float* scores;     // [segments, count], or null
};

void prune_forward(const TokenRows& tokens, const QueryView& queries, const PruneForward& call,
                   const PruneKernels& kernels, const Workers& workers);

// The options, inputs and outputs of one backward call. Its `rows` are the kept rows, or all tokens where the scores of
// all tokens have a gradient.
struct PruneBackward {
  Scoring scoring;
  float scale;
  bool masked;  // whether a score of -inf means a masked row, which gets no gradient of its score
  int64_t token_count, keep;
  const int64_t* index;      // [segments, keep], ascending
  const float* score;        // [segments, rows.count]
  const float* grad_score;   // [segments, keep], or null
  const float* grad_scores;  // [segments, token_count], or null
  TokenRows grad_kept;       // data null for none
  void* d_tokens;            // [segments, token_count, width], zeros before, or null
  void* d_queries;           // [segments, queries.count, width] of the type of the queries, or null
};

void prune_backward(const TokenRows& rows, const QueryView& queries, const PruneBackward& call,
                    const PruneKernels& kernels, const Workers& workers);

}  // namespace bridge_stg
