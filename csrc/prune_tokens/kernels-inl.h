// The kernels of kernels.h over the vectors of the simd_*.h that was included before. They have internal linkage and
// call nothing of the standard library; simd_scalar.h says why.
#pragma once

#include "common/simd_math.h"
#include "prune_tokens/kernels.h"

namespace bridge_stg {
namespace {

constexpr int kRows = 4;                            // rows that share a load of a query
constexpr int kQueries = kRegisters == 32 ? 4 : 2;  // queries that share a load of a row
constexpr int64_t kBlock = kRowBlock;
constexpr float kInfinity = __builtin_inff();

// Multiplies four rows with kQ queries into dots[q * kBlock + r], and with kSquares the rows with themselves into
// `squares`. Each product is summed in an order that depends on the width alone. With kAhead the rows `ahead` are
// prefetched meanwhile.
template <typename T, int kQ, bool kSquares, bool kAhead>
inline void dot_tile(const T* const* rows, const T* const* ahead, const QueryRows& queries, int64_t first, float* dots,
                     float* squares) {
  const float* query[kQ];
  for (int q = 0; q < kQ; ++q) query[q] = queries.data + (first + q) * queries.stride;
  Vec sums[kQ][kRows], own[kRows];
  for (int r = 0; r < kRows; ++r) {
    own[r] = splat(0.0f);
    for (int q = 0; q < kQ; ++q) sums[q][r] = splat(0.0f);
  }
  const int64_t whole = queries.width / kWidth * kWidth;
  for (int64_t d = 0; d < whole; d += kWidth) {
    Vec x[kRows];
    for (int r = 0; r < kRows; ++r) {
      if (kAhead) __builtin_prefetch(ahead[r] + d, 0, 2);
      x[r] = load(rows[r] + d);
      if (kSquares) own[r] = multiply_add(x[r], x[r], own[r]);
    }
    for (int q = 0; q < kQ; ++q) {
      const Vec y = load(query[q] + d);
      for (int r = 0; r < kRows; ++r) sums[q][r] = multiply_add(x[r], y, sums[q][r]);
    }
  }
  if (whole < queries.width) {
    for (int r = 0; r < kRows; ++r) {
      const Vec x = load(rows[r] + whole, queries.width - whole);
      if (kSquares) own[r] = multiply_add(x, x, own[r]);
      for (int q = 0; q < kQ; ++q) sums[q][r] = multiply_add(x, load(query[q] + whole), sums[q][r]);
    }
  }
  for (int q = 0; q < kQ; ++q) sum4(sums[q][0], sums[q][1], sums[q][2], sums[q][3], dots + (first + q) * kBlock);
  if (kSquares) sum4(own[0], own[1], own[2], own[3], squares);
}

template <typename T, int kQ>
inline void dot_tile(const T* const* rows, const T* const* ahead, const QueryRows& queries, int64_t first, float* dots,
                     float* squares) {
  if (squares != nullptr) return dot_tile<T, kQ, true, false>(rows, ahead, queries, first, dots, squares);
  if (ahead != nullptr) return dot_tile<T, kQ, false, true>(rows, ahead, queries, first, dots, squares);
  dot_tile<T, kQ, false, false>(rows, ahead, queries, first, dots, squares);
}

// Multiplies `count` <= kBlock rows with all queries into dots[q * kBlock + r], and with themselves into squares[r]
// unless that is null. Rows are read from memory once, because four of them stay in the nearest cache for all queries.
template <typename T>
void dot_rows(const T* const* rows, int64_t count, const QueryRows& queries, float* dots, float* squares) {
  for (int64_t r = 0; r < count; r += kRows) {
    const T *group[kRows], *next[kRows];
    for (int64_t i = 0; i < kRows; ++i) {
      group[i] = rows[smaller(r + i, count - 1)];
      next[i] = rows[smaller(r + kRows + i, count - 1)];
    }
    int64_t q = 0;
    for (; q + kQueries <= queries.count; q += kQueries) {
      const T* const* ahead = q <= kQueries ? next : nullptr;  // prefetched twice, more of them arrive in time
      dot_tile<T, kQueries>(group, ahead, queries, q, dots + r, q == 0 && squares ? squares + r : nullptr);
    }
    for (; q < queries.count; ++q) {
      dot_tile<T, 1>(group, nullptr, queries, q, dots + r, q == 0 && squares ? squares + r : nullptr);
    }
  }
}

// Two powers of two whose product scales a row to numbers around 1, where the squares of the row leave the range of
// float32. They are two because the product may leave that range too. {1, 1} leaves a row as it is.
struct Lift {
  float first, second;
};

inline float power(int exponent) { return float_from_bits(static_cast<uint32_t>(exponent + 127) << 23); }

// `value` is finite and above 0.
inline Lift lift_of(float value) {
  int exponent = 0;
  for (; value < 0x1p-126f; value *= 2.0f) --exponent;
  exponent += static_cast<int>(float_bits(value) >> 23) - 127;
  return {power(-(exponent / 2)), power(-(exponent - exponent / 2))};
}

template <typename T>
float largest_magnitude(const T* x, int64_t width) {
  float highest = 0.0f;
  for (int64_t d = 0; d < width; ++d) {
    const float value = __builtin_fabsf(to_float(x[d]));
    if (!(value <= highest)) highest = value;  // a NaN is taken, and stays
    if (highest != highest) break;
  }
  return highest;
}

// Computes the products and the square of a lifted row, summed in the order of dot_tile.
template <typename T>
void dot_lifted(const T* x, const Lift& lift, const QueryRows& queries, float* dots, float* square) {
  const Vec first = splat(lift.first), second = splat(lift.second);
  const int64_t whole = queries.width / kWidth * kWidth;
  for (int64_t q = -1; q < queries.count; ++q) {
    const float* query = queries.data + (q < 0 ? 0 : q) * queries.stride;
    Vec total = splat(0.0f);
    for (int64_t d = 0; d < queries.width; d += kWidth) {
      const Vec value = (d < whole ? load(x + d) : load(x + d, queries.width - d)) * first * second;
      total = multiply_add(value, q < 0 ? value : load(query + d), total);
    }
    alignas(64) float sums[kRows];
    sum4(total, total, total, total, sums);
    (q < 0 ? *square : dots[q * kBlock]) = sums[0];
  }
}

// Lifts the rows whose squares or products overflow or underflow, and computes these again. The powers of two cancel
// exactly in the cosine: where nothing over- or underflows, the bits stay the same.
template <typename T>
void lift_rows(const T* const* rows, int64_t count, const QueryRows& queries, float* dots, float* squares,
               Lift* lifts) {
  for (int64_t r = 0; r < count; ++r) {
    lifts[r] = {1.0f, 1.0f};
    bool fits = squares[r] >= 0x1p-60f && squares[r] <= 0x1p80f;
    for (int64_t q = 0; q < queries.count && fits; ++q) {
      fits = __builtin_fabsf(dots[q * kBlock + r]) < kInfinity;
    }
    if (fits) continue;
    const float highest = largest_magnitude(rows[r], queries.width);
    if (!(highest > 0.0f && highest < kInfinity)) continue;
    lifts[r] = lift_of(highest);
    dot_lifted(rows[r], lifts[r], queries, dots + r, squares + r);
  }
}

inline void reduce_max(const float* dots, int64_t queries, int64_t count, float* scores) {
  for (int64_t r = 0; r < count; r += kWidth) {
    Vec top = load(dots + r);
    for (int64_t q = 1; q < queries; ++q) top = maximum_or_nan(load(dots + q * kBlock + r), top);
    store(scores + r, top);
  }
}

inline void reduce_logsumexp(const float* dots, int64_t queries, int64_t count, float* scores) {
  reduce_max(dots, queries, count, scores);
  alignas(64) float totals[kBlock];
  for (int64_t r = 0; r < count; r += kWidth) {
    const Vec top = load(scores + r);
    Vec total = splat(0.0f);
    for (int64_t q = 0; q < queries; ++q) total = total + exponential(load(dots + q * kBlock + r) - top);
    store(totals + r, total);
  }
  for (int64_t r = 0; r < count; ++r) {
    const float top = scores[r];
    if (top - top == 0.0f) scores[r] = top + __builtin_logf(totals[r]);  // an infinite top, or a NaN, stays
  }
}

template <typename T>
void score_rows(const T* tokens, int64_t row_stride, int64_t count, const QueryRows& queries, const Scoring& scoring,
                float* scores, float* dots) {
  alignas(64) float squares[kBlock], reduced[kBlock];
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t block = smaller(kBlock, count - first);
    const T* rows[kBlock];
    for (int64_t r = 0; r < block; ++r) rows[r] = tokens + (first + r) * row_stride;
    dot_rows(rows, block, queries, dots, scoring.cosine ? squares : nullptr);
    if (scoring.cosine) {
      Lift lifts[kBlock];
      lift_rows(rows, block, queries, dots, squares, lifts);
      for (int64_t r = 0; r < block; r += kWidth) {
        const Vec inverse = inverse_root(load(squares + r));
        for (int64_t q = 0; q < queries.count; ++q) {
          store(dots + q * kBlock + r, load(dots + q * kBlock + r) * inverse);
        }
      }
    }
    if (scoring.reduce == Reduce::kLogSumExp) {
      reduce_logsumexp(dots, queries.count, block, reduced);
    } else {
      reduce_max(dots, queries.count, block, reduced);
    }
    for (int64_t r = 0; r < block; ++r) scores[first + r] = reduced[r];
  }
}

void score(ElementType type, const void* rows, int64_t row_stride, int64_t count, const QueryRows& queries,
           const Scoring& scoring, float* scores, float* scratch) {
  with_element(type, [&](auto element) {
    using T = decltype(element);
    score_rows(static_cast<const T*>(rows), row_stride, count, queries, scoring, scores, scratch);
  });
}

// Replaces the products x . q by their gradients. shrink[r] becomes the factor of the row in the part of its gradient
// that goes through the norm; best[r] the only query with a gradient, or -1 where all have one.
void weigh(const BackwardBlock& block, const QueryRows& queries, const Scoring& scoring, float scale,
           const float* squares, float* dots, float* shrink, int32_t* best) {
  alignas(64) float inverse[kBlock];
  for (int64_t r = 0; r < block.count; r += kWidth) {
    store(inverse + r, scoring.cosine ? inverse_root(load(squares + r)) : splat(1.0f));
  }
  const bool soft = scoring.reduce == Reduce::kLogSumExp;
  for (int64_t r = 0; r < block.count; ++r) {
    const float factor = scale * inverse[r];
    float* dot = dots + r;
    int64_t top = 0;
    for (int64_t q = 0; q < queries.count; ++q) {
      dot[q * kBlock] *= factor;
      const float value = dot[q * kBlock], highest = dot[top * kBlock];
      if (value > highest || (value != value && highest == highest)) top = q;
    }
    best[r] = soft ? -1 : static_cast<int32_t>(top);
    const float highest = dot[top * kBlock];
    shrink[r] = block.grad[r] * highest * inverse[r] * inverse[r];
    if (!soft) dot[top * kBlock] = block.grad[r] * factor;
  }
  if (!soft) return;
  for (int64_t r = 0; r < block.count; r += kWidth) {
    Vec top = load(dots + r);
    for (int64_t q = 1; q < queries.count; ++q) top = maximum_or_nan(load(dots + q * kBlock + r), top);
    Vec total = splat(0.0f), weighted = splat(0.0f);
    for (int64_t q = 0; q < queries.count; ++q) {
      const Vec value = load(dots + q * kBlock + r), part = exponential(value - top);
      total = total + part;
      weighted = multiply_add(part, value, weighted);
      store(dots + q * kBlock + r, part);
    }
    const Vec inverse_norm = load(inverse + r), share = load(block.grad + r) / total;
    store(shrink + r, share * weighted * inverse_norm * inverse_norm);
    const Vec factor = share * splat(scale) * inverse_norm;
    for (int64_t q = 0; q < queries.count; ++q) store(dots + q * kBlock + r, load(dots + q * kBlock + r) * factor);
  }
}

template <typename T>
struct RowGradient {
  const T *x, *extra;
  T* out;
  float shrink;
  Lift lift;
};

// Computes one vector of a row's gradient, out = extra - shrink x + sum_q weight_q query_q, and adds weight_q x to
// d_query_q. With kLifted the weights and `shrink` belong to the lifted row.
template <typename T, bool kPartial, bool kLifted>
inline void row_step(const RowGradient<T>& row, const QueryRows& queries, int64_t first, int64_t last,
                     const float* weights, float* d_queries, int64_t d) {
  const int64_t rest = queries.width - d;
  Vec x = kPartial ? load(row.x + d, rest) : load(row.x + d);
  if (kLifted) x = x * splat(row.lift.first) * splat(row.lift.second);
  if (row.out != nullptr) {
    Vec extra = splat(0.0f);
    if (row.extra != nullptr) extra = kPartial ? load(row.extra + d, rest) : load(row.extra + d);
    Vec sum = kLifted ? splat(0.0f) : extra;
    for (int64_t q = first; q < last; ++q) {
      sum = multiply_add(splat(weights[q * kBlock]), load(queries.data + q * queries.stride + d), sum);
    }
    if (row.shrink != 0.0f) sum = multiply_add(splat(-row.shrink), x, sum);
    if (kLifted) sum = sum * splat(row.lift.first) * splat(row.lift.second) + extra;
    if (kPartial) {
      store(row.out + d, sum, rest);
    } else {
      store(row.out + d, sum);
    }
  }
  if (d_queries == nullptr) return;
  for (int64_t q = first; q < last; ++q) {
    float* to = d_queries + q * queries.stride + d;
    store(to, multiply_add(splat(weights[q * kBlock]), x, load(to)));
  }
}

template <typename T, bool kLifted>
void write_row(const RowGradient<T>& row, const QueryRows& queries, int64_t first, int64_t last, const float* weights,
               float* d_queries) {
  const int64_t whole = queries.width / kWidth * kWidth;
  for (int64_t d = 0; d < whole; d += kWidth) {
    row_step<T, false, kLifted>(row, queries, first, last, weights, d_queries, d);
  }
  if (whole < queries.width) row_step<T, true, kLifted>(row, queries, first, last, weights, d_queries, whole);
}

template <typename T>
void copy_or_clear(const T* from, T* to, int64_t count) {
  if (from != nullptr) {
    __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
  } else {
    __builtin_memset(to, 0, static_cast<size_t>(count) * sizeof(T));
  }
}

template <typename T>
void backward_rows(const BackwardBlock& block, const QueryRows& queries, const Scoring& scoring, float scale,
                   float* d_queries, float* dots) {
  alignas(64) float squares[kBlock], shrink[kBlock];
  int32_t best[kBlock];
  const T* rows[kBlock] = {};
  for (int64_t r = 0; r < block.count; ++r) rows[r] = static_cast<const T*>(block.rows[r]);
  Lift lifts[kBlock];
  dot_rows(rows, block.count, queries, dots, scoring.cosine ? squares : nullptr);
  if (scoring.cosine) lift_rows(rows, block.count, queries, dots, squares, lifts);
  weigh(block, queries, scoring, scale, squares, dots, shrink, best);
  for (int64_t r = 0; r < block.count; ++r) {
    const T* extra = static_cast<const T*>(block.extra[r]);
    T* out = static_cast<T*>(block.out[r]);
    if (!block.live[r]) {
      if (out != nullptr) copy_or_clear(extra, out, queries.width);
      continue;
    }
    const Lift lift = scoring.cosine ? lifts[r] : Lift{1.0f, 1.0f};
    const RowGradient<T> row{rows[r], extra, out, scoring.cosine ? shrink[r] : 0.0f, lift};
    const int64_t first = best[r] < 0 ? 0 : best[r], last = best[r] < 0 ? queries.count : first + 1;
    if (lift.first == 1.0f && lift.second == 1.0f) {
      write_row<T, false>(row, queries, first, last, dots + r, d_queries);
    } else {
      write_row<T, true>(row, queries, first, last, dots + r, d_queries);
    }
  }
}

void backward(ElementType type, const BackwardBlock& block, const QueryRows& queries, const Scoring& scoring,
              float scale, float* d_queries, float* scratch) {
  with_element(type, [&](auto element) {
    backward_rows<decltype(element)>(block, queries, scoring, scale, d_queries, scratch);
  });
}

constexpr PruneKernels kKernels = {score, backward, count_at_least};

}  // namespace
}  // namespace bridge_stg
