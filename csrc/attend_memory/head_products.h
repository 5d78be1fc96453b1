// The products of each head with its part of a projection weight, which takes head_dim numbers to width numbers.
#pragma once

#include "attend_memory/attend_memory_cpu.h"

namespace bridge_stg {

// narrow [count, heads * head_dim], wide [count, heads, width], weight [heads * head_dim, width].
struct HeadShape {
  int64_t count, heads, head_dim, width;
};

// wide[n, h] = narrow[n, h] weight[h].
void expand_heads(const HeadShape& shape, const float* narrow, const float* weight, float* wide,
                  const AttendKernels& kernels, const Workers& workers);

// narrow[n, h] = wide[n, h] weight[h]^T.
void contract_heads(const HeadShape& shape, const float* wide, const float* weight, float* narrow,
                    const AttendKernels& kernels, const Workers& workers);

// weight[h] = sum over n of narrow[n, h]^T wide[n, h]: the gradient of the weight for both.
void correlate_heads(const HeadShape& shape, const float* narrow, const float* wide, float* weight,
                     const AttendKernels& kernels, const Workers& workers);

// One call of `attend_heads`, whose query and output are narrow: head_dim numbers a head.
struct HeadCall {
  int64_t queries, heads, head_dim;  // of a clip
  float scale;
  const float* query;         // [clips, queries, heads * head_dim]
  const float* key_weight;    // [heads * head_dim, width]
  const float* value_weight;  // [heads * head_dim, width]
  float* out;                 // [clips, queries, heads * head_dim]
  float* lse;                 // [clips, queries * heads]
};

// Expands the query, attends, and contracts the output. Where there are many clips it takes a few at a time, so that
// the wide rows in between never leave the cache.
void attend_heads(const Memory& memory, const HeadCall& call, const AttendKernels& kernels, const Workers& workers);

}  // namespace bridge_stg
