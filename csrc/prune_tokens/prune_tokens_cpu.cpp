#include "prune_tokens/prune_tokens_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/aligned_bytes.h"
#include "prune_tokens/select.h"

namespace bridge_stg {
namespace {

constexpr int64_t kStrideUnit = 16;

// The scratch memory of one worker, and the folded queries of the segment that it works on.
class WorkerScratch {
 public:
  WorkerScratch(const QueryView& queries, Reduce reduce, int64_t width)
      : view_(queries),
        reduce_(reduce),
        rows_{nullptr, folded_count(queries, reduce), width, round_up(width, kStrideUnit)},
        query_(rows_.count * rows_.stride * 4),
        dots_(rows_.count * kRowBlock * 4) {
    rows_.data = floats(query_);
  }

  float* dots() const { return floats(dots_); }

  // Returns the queries of a segment, folded and times `scale`. A call for the same segment folds nothing again.
  const QueryRows& queries_of(int64_t segment, float scale) {
    if (segment != segment_) {
      segment_ = segment;
      with_element(view_.type, [&](auto element) { fold<decltype(element)>(scale); });
    }
    return rows_;
  }

 private:
  static float* floats(const AlignedBytes& bytes) { return reinterpret_cast<float*>(bytes.data()); }

  template <typename T>
  void fold(float scale) {
    const T* from = static_cast<const T*>(view_.data) + segment_ * view_.segment_stride;
    const int64_t step = view_.element_stride;
    for (int64_t q = 0; q < view_.count; ++q, from += view_.query_stride) {
      float* to = floats(query_) + (q < rows_.count ? q * rows_.stride : 0);
      if (reduce_ == Reduce::kMean) {
        for (int64_t d = 0; d < rows_.width; ++d) to[d] = (q == 0 ? 0.0f : to[d]) + to_float(from[d * step]);
      } else if (step == 1) {
        for (int64_t d = 0; d < rows_.width; ++d) to[d] = to_float(from[d]) * scale;
      } else {
        for (int64_t d = 0; d < rows_.width; ++d) to[d] = to_float(from[d * step]) * scale;
      }
    }
    if (reduce_ != Reduce::kMean) return;
    const float count = static_cast<float>(view_.count);
    for (int64_t d = 0; d < rows_.width; ++d) floats(query_)[d] = floats(query_)[d] / count * scale;
  }

  QueryView view_;
  Reduce reduce_;
  QueryRows rows_;
  AlignedBytes query_, dots_;
  int64_t segment_ = -1;
};

std::vector<WorkerScratch> scratch_of(const Workers& workers, const QueryView& queries, Reduce reduce, int64_t width) {
  std::vector<WorkerScratch> scratch;
  for (int64_t i = 0; i < workers.count; ++i) scratch.emplace_back(queries, reduce, width);
  return scratch;
}

// Selects the kept tokens of one segment by its scores. Scores of masked tokens become -inf.
void pick(const PruneForward& call, int64_t segment, int64_t count, float* scores, int32_t* keys,
          const PruneKernels& kernels) {
  const bool* mask = call.mask == nullptr ? nullptr : call.mask + segment * count;
  for (int64_t n = 0; n < count; ++n) {
    const bool out = mask != nullptr && !mask[n];
    keys[n] = out ? kMaskedKey : order_key(scores[n]);
    if (out) scores[n] = -INFINITY;
  }
  int64_t* index = call.index + segment * call.keep;
  select_highest(keys, count, call.keep, kernels.count_at_least, index);
  for (int64_t j = 0; j < call.keep; ++j) call.score[segment * call.keep + j] = scores[index[j]];
}

void copy_kept(const TokenRows& tokens, const PruneForward& call, int64_t segment, int64_t first, int64_t last) {
  const int64_t bytes = tokens.width * element_size(tokens.type);
  for (int64_t j = segment * call.keep + first; j < segment * call.keep + last; ++j) {
    std::memcpy(static_cast<char*>(call.kept) + j * bytes, tokens.row(segment, call.index[j]),
                static_cast<size_t>(bytes));
  }
}

// The positions 0..count-1 of every segment, cut into parts of at most `most`.
struct Parts {
  int64_t segments, count, most, each = (count + most - 1) / most;

  int64_t items() const { return segments * each; }
  int64_t segment(int64_t item) const { return item / each; }
  int64_t first(int64_t item) const { return item % each * most; }
  int64_t last(int64_t item) const { return std::min(first(item) + most, count); }
};

}  // namespace

void prune_forward(const TokenRows& tokens, const QueryView& queries, const PruneForward& call,
                   const PruneKernels& kernels, const Workers& workers) {
  const int64_t count = tokens.count;
  std::vector<WorkerScratch> scratch = scratch_of(workers, queries, call.scoring.reduce, tokens.width);
  // A worker takes whole segments, because kept rows are then still in its cache when it copies them. Where segments
  // are too few for that, every segment is cut into parts.
  const bool whole = tokens.segments >= 2 * workers.count || workers.count == 1;
  const int64_t tables = whole ? workers.count : tokens.segments;
  const AlignedBytes key_bytes(tables * count * 4), score_bytes(call.scores == nullptr ? tables * count * 4 : 0);
  const auto keys = [&](int64_t table) { return reinterpret_cast<int32_t*>(key_bytes.data()) + table * count; };
  const auto scores = [&](int64_t segment, int64_t table) {
    return call.scores != nullptr ? call.scores + segment * count
                                  : reinterpret_cast<float*>(score_bytes.data()) + table * count;
  };
  const auto score_part = [&](int64_t segment, int64_t first, int64_t last, int64_t worker, float* to) {
    kernels.score(tokens.type, tokens.row(segment, first), tokens.row_stride, last - first,
                  scratch[worker].queries_of(segment, call.scale), call.scoring, to + first, scratch[worker].dots());
  };
  if (whole) {
    for_each_item(workers, tokens.segments, [&](int64_t segment, int64_t worker) {
      float* to = scores(segment, worker);
      score_part(segment, 0, count, worker, to);
      pick(call, segment, count, to, keys(worker), kernels);
      copy_kept(tokens, call, segment, 0, call.keep);
    });
    return;
  }
  const Parts parts{tokens.segments, count, 4 * kRowBlock}, copies{tokens.segments, call.keep, 4 * kRowBlock};
  for_each_item(workers, parts.items(), [&](int64_t item, int64_t worker) {
    const int64_t segment = parts.segment(item);
    score_part(segment, parts.first(item), parts.last(item), worker, scores(segment, segment));
  });
  for_each_item(workers, tokens.segments, [&](int64_t segment, int64_t) {
    pick(call, segment, count, scores(segment, segment), keys(segment), kernels);
  });
  for_each_item(workers, copies.items(), [&](int64_t item, int64_t) {
    copy_kept(tokens, call, copies.segment(item), copies.first(item), copies.last(item));
  });
}

namespace {

// Hands the rows of one segment to the backward kernel in blocks, with their gradients.
class RowsBackward {
 public:
  RowsBackward(const TokenRows& rows, const PruneBackward& call, int64_t segment)
      : rows_(rows), call_(call), segment_(segment), index_(call.index + segment * call.keep) {}

  template <typename Run>
  void each_block(int64_t first, int64_t last, const Run& run) {
    const bool dense = call_.grad_scores != nullptr;
    // The place, among the kept rows, of the next kept row.
    int64_t place = dense ? std::lower_bound(index_, index_ + call_.keep, first) - index_ : first;
    BackwardBlock block;
    for (; first < last; first += block.count) {
      block.count = std::min(kRowBlock, last - first);
      for (int64_t r = 0; r < block.count; ++r) {
        const int64_t row = first + r, score = segment_ * rows_.count + row;
        const bool kept = !dense || (place < call_.keep && index_[place] == row);
        block.rows[r] = rows_.row(segment_, row);
        block.extra[r] = kept && call_.grad_kept.data != nullptr ? call_.grad_kept.row(segment_, place) : nullptr;
        block.out[r] = token_gradient(dense ? row : index_[row]);
        block.grad[r] = dense ? call_.grad_scores[score] : 0.0f;
        if (kept && call_.grad_score != nullptr) block.grad[r] += call_.grad_score[segment_ * call_.keep + place];
        block.live[r] = !(call_.masked && call_.score[score] == -INFINITY);
        place += kept;
      }
      for (int64_t r = block.count; r < kRowBlock; ++r) block.grad[r] = 0.0f;
      run(block);
    }
  }

 private:
  void* token_gradient(int64_t position) const {
    if (call_.d_tokens == nullptr) return nullptr;
    const int64_t row = segment_ * call_.token_count + position;
    return static_cast<char*>(call_.d_tokens) + row * rows_.width * element_size(rows_.type);
  }

  const TokenRows& rows_;
  const PruneBackward& call_;
  int64_t segment_;
  const int64_t* index_;
};

// Sums the parts [each, folded, stride] of a segment in their order, and writes them to each query.
template <typename T>
void write_query_gradient(const float* parts, int64_t each, const QueryRows& folded, int64_t queries, T* out) {
  const float share = static_cast<float>(queries / folded.count);  // of the mean
  for (int64_t q = 0; q < queries; ++q) {
    const int64_t source = q < folded.count ? q : 0;
    for (int64_t d = 0; d < folded.width; ++d) {
      float sum = 0.0f;
      for (int64_t part = 0; part < each; ++part) sum += parts[(part * folded.count + source) * folded.stride + d];
      from_float(sum / share, out + q * folded.width + d);
    }
  }
}

}  // namespace

void prune_backward(const TokenRows& rows, const QueryView& queries, const PruneBackward& call,
                    const PruneKernels& kernels, const Workers& workers) {
  const QueryRows shape{nullptr, folded_count(queries, call.scoring.reduce), rows.width,
                        round_up(rows.width, kStrideUnit)};
  // Parts are long enough that the sums of all parts take at most a quarter of the memory of the rows.
  const Parts parts{rows.segments, rows.count, round_up(std::max(4 * kRowBlock, 4 * shape.count), kRowBlock)};
  const bool scored = call.grad_score != nullptr || call.grad_scores != nullptr;
  const int64_t sum_size = shape.count * shape.stride;
  const AlignedBytes sum_bytes(call.d_queries != nullptr ? parts.items() * sum_size * 4 : 0);
  float* const sums = reinterpret_cast<float*>(sum_bytes.data());
  if (scored) {
    std::vector<WorkerScratch> scratch = scratch_of(workers, queries, call.scoring.reduce, rows.width);
    for_each_item(workers, parts.items(), [&](int64_t item, int64_t worker) {
      const int64_t segment = parts.segment(item);
      const QueryRows& query = scratch[worker].queries_of(segment, 1.0f);
      float* sum = call.d_queries == nullptr ? nullptr : sums + item * sum_size;
      RowsBackward(rows, call, segment)
          .each_block(parts.first(item), parts.last(item), [&](const BackwardBlock& block) {
            kernels.backward(rows.type, block, query, call.scoring, call.scale, sum, scratch[worker].dots());
          });
    });
  } else if (call.d_tokens != nullptr && call.grad_kept.data != nullptr) {
    const size_t bytes = static_cast<size_t>(rows.width * element_size(rows.type));
    for_each_item(workers, parts.items(), [&](int64_t item, int64_t) {
      RowsBackward(rows, call, parts.segment(item))
          .each_block(parts.first(item), parts.last(item), [&](const BackwardBlock& block) {
            for (int64_t r = 0; r < block.count; ++r) std::memcpy(block.out[r], block.extra[r], bytes);
          });
    });
  }
  if (call.d_queries == nullptr) return;
  for_each_item(workers, rows.segments, [&](int64_t segment, int64_t) {
    const float* part = sums + segment * parts.each * sum_size;
    with_element(queries.type, [&](auto element) {
      auto* out = static_cast<decltype(element)*>(call.d_queries) + segment * queries.count * rows.width;
      write_query_gradient(part, parts.each, shape, queries.count, out);
    });
  });
}

}  // namespace bridge_stg
