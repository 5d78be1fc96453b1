#include "attend_memory/head_products.h"

#include <algorithm>

#include "attend_memory/key_block.h"

namespace bridge_stg {
namespace {

constexpr int64_t kRows = 128;   // rows of a unit
constexpr int64_t kStaged = 64;  // rows copied at a time
constexpr int64_t kSlice = 128;  // columns of a unit

// Copies rows of one head side by side. They lie `heads * width` floats apart, often in the same few cache sets.
void stage(const HeadShape& shape, const float* from, int64_t rows, int64_t columns, int64_t stride,
           const AttendKernels& kernels, float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    kernels.widen(ElementType::kFloat32, from + r * shape.heads * shape.width, nullptr, columns, to + r * stride);
  }
}

// Calls task(head, part) for every head and `parts` parts.
template <typename Task>
void for_heads(const HeadShape& shape, int64_t parts, const Workers& workers, const Task& task) {
  for_each_item(workers, shape.heads * parts, [&](int64_t i, int64_t) { task(i / parts, i % parts); });
}

}  // namespace

void expand_heads(const HeadShape& shape, const float* narrow, const float* weight, float* wide,
                  const AttendKernels& kernels, const Workers& workers) {
  const int64_t row = shape.heads * shape.head_dim, wide_row = shape.heads * shape.width;
  for_heads(shape, ceil_div(shape.count, kRows), workers, [&](int64_t h, int64_t part) {
    const int64_t first = part * kRows, count = std::min(kRows, shape.count - first);
    kernels.product({count, shape.width, shape.head_dim, narrow + first * row + h * shape.head_dim, row, 1,
                     weight + h * shape.head_dim * shape.width, shape.width, wide + first * wide_row + h * shape.width,
                     wide_row, false, nullptr});
  });
}

void contract_heads(const HeadShape& shape, const float* wide, const float* weight, float* narrow,
                    const AttendKernels& kernels, const Workers& workers) {
  const int64_t row = shape.heads * shape.head_dim, wide_row = shape.heads * shape.width;
  const int64_t columns = round_up(shape.head_dim, kColumns), stride = spread_width(shape.width);
  for_heads(shape, ceil_div(shape.count, kRows), workers, [&](int64_t h, int64_t part) {
    Scratch& scratch = Scratch::of_thread();
    scratch.start(shape.width * columns + kStaged * stride + 64);
    float* across = scratch.take(shape.width * columns);  // [width, head_dim]
    float* staged = scratch.take(kStaged * stride);
    kernels.transpose(weight + h * shape.head_dim * shape.width, shape.width, shape.head_dim, shape.width, 1.0f, across,
                      columns);
    const int64_t last = std::min((part + 1) * kRows, shape.count);
    for (int64_t n = part * kRows; n < last; n += kStaged) {
      const int64_t count = std::min(kStaged, last - n);
      stage(shape, wide + n * wide_row + h * shape.width, count, shape.width, stride, kernels, staged);
      kernels.product({count, shape.head_dim, shape.width, staged, stride, 1, across, columns,
                       narrow + n * row + h * shape.head_dim, row, false, nullptr});
    }
  });
}

void correlate_heads(const HeadShape& shape, const float* narrow, const float* wide, float* weight,
                     const AttendKernels& kernels, const Workers& workers) {
  const int64_t row = shape.heads * shape.head_dim, wide_row = shape.heads * shape.width;
  for_heads(shape, ceil_div(shape.width, kSlice), workers, [&](int64_t h, int64_t slice) {
    Scratch& scratch = Scratch::of_thread();
    scratch.start(kStaged * kSlice + 64);
    float* staged = scratch.take(kStaged * kSlice);
    const int64_t column = slice * kSlice, columns = std::min(kSlice, shape.width - column);
    float* to = weight + h * shape.head_dim * shape.width + column;
    if (shape.count == 0) {
      for (int64_t d = 0; d < shape.head_dim; ++d) std::fill_n(to + d * shape.width, columns, 0.0f);
    }
    for (int64_t n = 0; n < shape.count; n += kStaged) {
      const int64_t count = std::min(kStaged, shape.count - n);
      stage(shape, wide + n * wide_row + h * shape.width + column, count, columns, kSlice, kernels, staged);
      kernels.product({shape.head_dim, columns, count, narrow + n * row + h * shape.head_dim, 1, row, staged, kSlice,
                       to, shape.width, n > 0, nullptr});
    }
  });
}

namespace {

// Returns one clip of a memory as a memory.
Memory clip_of(const Memory& memory, int64_t clip) {
  const auto shift = [&](KeyRows rows) {
    if (rows.data == nullptr) return rows;
    rows.data = static_cast<const char*>(rows.data) + clip * rows.clip_stride * element_size(memory.type);
    return rows;
  };
  Memory one = memory;
  one.clips = 1;
  one.value = shift(memory.value);
  one.position = shift(memory.position);
  if (memory.bias != nullptr) one.bias = memory.bias + clip * memory.keys;
  if (memory.visible != nullptr) one.visible = memory.visible + clip * memory.keys;
  return one;
}

// How many clips are done together, so that a weight that was read serves several rows.
int64_t group_of(int64_t queries) { return ceil_div(12, std::max<int64_t>(queries, 1)); }

}  // namespace

void attend_heads(const Memory& memory, const HeadCall& call, const AttendKernels& kernels, const Workers& workers) {
  const int64_t width = memory.width, rows = call.queries * call.heads, narrow = call.heads * call.head_dim;
  const int64_t group = group_of(call.queries), groups = ceil_div(memory.clips, group);
  const Workers alone{1, [](int64_t units, const std::function<void(int64_t, int64_t)>& task) { task(0, units); }};
  if (groups < 4 || !Attention(clip_of(memory, 0), rows, kernels, alone).whole_clips()) {
    const HeadShape shape{memory.clips * call.queries, call.heads, call.head_dim, width};
    const auto wide = new_floats(2 * memory.clips * rows * width);
    float* attended = wide.get() + memory.clips * rows * width;
    expand_heads(shape, call.query, call.key_weight, wide.get(), kernels, workers);
    Attention(memory, rows, kernels, workers)
        .forward({rows, call.scale, wide.get(), attended, call.lse, nullptr, nullptr});
    contract_heads(shape, attended, call.value_weight, call.out, kernels, workers);
    return;
  }
  const int64_t columns = round_up(call.head_dim, kColumns), stride = spread_width(width);
  const int64_t across_size = width * columns;  // of a head: [width, head_dim]
  const auto across = new_floats(call.heads * across_size);
  for (int64_t h = 0; h < call.heads; ++h) {
    kernels.transpose(call.value_weight + h * call.head_dim * width, width, call.head_dim, width, 1.0f,
                      across.get() + h * across_size, columns);
  }
  for_each_item(workers, groups, [&](int64_t i, int64_t) {
    const int64_t most = group * call.queries;
    Scratch& scratch = Scratch::outer_of_thread();
    scratch.start(most * call.heads * width + most * stride + 64);
    float* wide = scratch.take(most * call.heads * width);  // the query rows, which their outputs replace
    float* staged = scratch.take(most * stride);
    const int64_t clip = i * group, end = std::min(clip + group, memory.clips);
    const HeadShape shape{(end - clip) * call.queries, call.heads, call.head_dim, width};
    const int64_t at = clip * call.queries * narrow;
    for (int64_t h = 0; h < call.heads; ++h) {
      kernels.product({shape.count, width, call.head_dim, call.query + at + h * call.head_dim, narrow, 1,
                       call.key_weight + h * call.head_dim * width, width, wide + h * width, call.heads * width, false,
                       nullptr});
    }
    for (int64_t c = clip; c < end; ++c) {
      const Memory one = clip_of(memory, c);
      float* own = wide + (c - clip) * rows * width;
      Attention(one, rows, kernels, alone).forward({rows, call.scale, own, own, call.lse + c * rows, nullptr, nullptr});
    }
    for (int64_t h = 0; h < call.heads; ++h) {
      stage(shape, wide + h * width, shape.count, width, stride, kernels, staged);
      kernels.product({shape.count, call.head_dim, width, staged, stride, 1, across.get() + h * across_size, columns,
                       call.out + at + h * call.head_dim, narrow, false, nullptr});
    }
  });
}

}  // namespace bridge_stg
