#include "attend_memory/attend_memory_cpu.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "attend_memory/key_block.h"

namespace bridge_stg {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Floats of a tile of query rows and of a block of keys. Two tiles (the rows and their outputs) and a block together
// fit a cache of 1 MiB.
constexpr int64_t kTileFloats = 65536, kBlockFloats = 65536;
constexpr int64_t kLeastTile = 32, kLeastBlock = 32, kMostBlock = 128;
// Columns of the memory's gradient that one unit computes.
constexpr int64_t kSlice = 128;
// Units that are enough for many threads, and the fewest keys of a unit for which the sum over units is worth its time.
constexpr int64_t kUnits = 32, kLeastSplit = 1024;

int64_t block_of(int64_t width) {
  const int64_t fits = kBlockFloats / std::max<int64_t>(width, 1) / kLeastBlock * kLeastBlock;
  return std::clamp(fits, kLeastBlock, kMostBlock);
}

// The stride of a matrix of `columns` columns. Wide rows get a gap, so that one column of all rows does not fall into
// the same cache set.
int64_t spread(int64_t columns) { return columns >= 64 ? columns + kColumns : columns; }

void clear(float* data, int64_t count) { std::memset(data, 0, static_cast<size_t>(count) * sizeof(float)); }

}  // namespace

// Intermediate results of the units: for each clip and split the peaks and totals of the rows, and their sums where
// there are several splits; for each clip and block the peaks that the exponentials of a stashed block were taken with.
struct Attention::Partial {
  std::unique_ptr<float[]> peak, total, sum, block_peak;
};

Attention::Attention(const Memory& memory, int64_t rows, const AttendKernels& kernels, const Workers& workers)
    : memory_(memory), kernels_(kernels), workers_(workers), rows_(rows), columns_(stash_columns(rows)) {
  const int64_t fits = kTileFloats / std::max<int64_t>(memory.width, 1) / kLeastTile * kLeastTile;
  const int64_t most = std::max(fits, kLeastTile);
  tiles_ = std::max<int64_t>(ceil_div(columns_, most), 1);
  tile_ = std::max(round_up(ceil_div(columns_, tiles_), kColumns), kColumns);
  tiles_ = std::max<int64_t>(ceil_div(columns_, tile_), 1);
  block_ = block_of(memory.width);
  blocks_ = ceil_div(memory.keys, block_);
  const int64_t wanted = ceil_div(kUnits, std::max<int64_t>(memory.clips * tiles_, 1));
  const int64_t splits = std::clamp<int64_t>(memory.keys / kLeastSplit, 1, wanted);
  split_ = std::max(round_up(ceil_div(memory.keys, splits), block_), block_);
  splits_ = std::max<int64_t>(ceil_div(memory.keys, split_), 1);
}

Attention::Unit Attention::unit(int64_t number) const {
  const int64_t tile = number % tiles_, split = number / tiles_ % splits_;
  Unit unit;
  unit.clip = number / tiles_ / splits_;
  unit.split = split;
  unit.first_row = tile * tile_;
  unit.rows = std::min(tile_, rows_ - unit.first_row);
  unit.first_key = split * split_;
  unit.last_key = std::min(unit.first_key + split_, memory_.keys);
  return unit;
}

void Attention::for_units(const std::function<void(const Unit&)>& task) const {
  for_each_item(workers_, units(), [&](int64_t i, int64_t) { task(unit(i)); });
}

void Attention::forward(const Forward& call) const {
  const int64_t clips = memory_.clips;
  if (clips == 0 || rows_ == 0) {
    if (call.mass != nullptr) clear(call.mass, clips * memory_.keys);
    return;
  }
  Partial partial;
  partial.peak = new_floats(clips * splits_ * columns_);
  partial.total = new_floats(clips * splits_ * columns_);
  if (splits_ > 1) partial.sum = new_floats(clips * splits_ * rows_ * memory_.width);
  if (call.stash != nullptr) partial.block_peak = new_floats(clips * blocks_ * columns_);
  for_units([&](const Unit& unit) { attend_unit(call, unit, partial); });
  if (splits_ > 1) {
    for_each_item(workers_, clips * rows_, [&](int64_t i, int64_t) { merge_row(call, partial, i / rows_, i % rows_); });
  }
  // A unit that is a whole clip has normalized its blocks itself, while they were in the cache.
  if (call.stash == nullptr || (whole_clips() && call.mass == nullptr)) return;
  for_each_item(workers_, clips * blocks_, [&](int64_t i, int64_t) {
    const int64_t clip = i / blocks_, block = i % blocks_;
    if (!whole_clips()) normalize_block(call, partial, clip, block);
    if (call.mass == nullptr) return;
    const int64_t key = block * block_, count = std::min(block_, memory_.keys - key);
    const Block p{call.stash + (clip * memory_.keys + key) * columns_, count, columns_, columns_};
    kernels_.row_sums(p, rows_, call.mass + clip * memory_.keys + key);
  });
}

void Attention::attend_unit(const Forward& call, const Unit& unit, const Partial& partial) const {
  const int64_t width = memory_.width, columns = round_up(unit.rows, kColumns), stride = spread(columns);
  KeyReader reader(memory_, kernels_, block_, (width + block_) * stride + 2 * columns);
  float* query = reader.take(width * stride);  // [width, rows]
  float* own_block = reader.take(block_ * stride);
  float* old_peak = reader.take(columns);
  float* keep = reader.take(columns);
  const int64_t first_row = unit.clip * rows_ + unit.first_row;
  kernels_.transpose(call.query + first_row * width, width, unit.rows, width, call.scale, query, stride);

  const int64_t at = (unit.clip * splits_ + unit.split) * columns_ + unit.first_row;
  float *peak = partial.peak.get() + at, *total = partial.total.get() + at;
  std::fill(peak, peak + columns, -kInfinity);
  clear(total, columns);
  float* sum = splits_ == 1 ? call.out + first_row * width
                            : partial.sum.get() + ((unit.clip * splits_ + unit.split) * rows_ + unit.first_row) * width;
  for (int64_t key = unit.first_key; key < unit.last_key; key += block_) {
    const int64_t count = std::min(block_, unit.last_key - key);
    const bool stashed = call.stash != nullptr;
    const Block score{stashed ? call.stash + (unit.clip * memory_.keys + key) * columns_ + unit.first_row : own_block,
                      count, columns, stashed ? columns_ : stride};
    const FloatRows values = reader.values(unit.clip, key, count), keys = reader.keys(unit.clip, key, count, values);
    kernels_.product(
        {count, columns, width, keys.data, keys.stride, 1, query, stride, score.data, score.stride, false, nullptr});
    std::copy(peak, peak + columns, old_peak);
    kernels_.peaks(score, reader.bias(unit.clip, key, count), peak);
    kernels_.decay(old_peak, peak, columns, keep);
    kernels_.scale({total, 1, columns, columns}, keep);
    kernels_.exponentials(score, peak, total);
    const bool first = key == unit.first_key;
    kernels_.product(
        {unit.rows, width, count, score.data, 1, score.stride, values.data, values.stride, sum, width, !first, keep});
    if (stashed) {
      const int64_t block = unit.clip * blocks_ + key / block_;
      std::copy(peak, peak + columns, partial.block_peak.get() + block * columns_ + unit.first_row);
    }
  }
  if (splits_ > 1) return;
  if (unit.first_key == unit.last_key) clear(sum, unit.rows * width);
  for (int64_t r = 0; r < unit.rows; ++r, sum += width) {
    call.lse[first_row + r] = peak[r] + std::log(total[r]);
    kernels_.narrow(sum, total[r] == 0.0f ? 0.0f : 1.0f / total[r], width, ElementType::kFloat32, sum);
  }
  if (call.stash == nullptr || tiles_ > 1) return;
  for (int64_t block = 0; block < blocks_; ++block) normalize_block(call, partial, unit.clip, block);
}

void Attention::merge_row(const Forward& call, const Partial& partial, int64_t clip, int64_t row) const {
  const int64_t width = memory_.width;
  Scratch& scratch = Scratch::of_thread();
  scratch.start(splits_ + 64);
  float* weight = scratch.take(splits_);
  float* peak = partial.peak.get() + clip * splits_ * columns_ + row;
  float* total = partial.total.get() + clip * splits_ * columns_ + row;
  float top = peak[0];
  for (int64_t s = 1; s < splits_; ++s) {
    const float next = peak[s * columns_];
    if (next > top || next != next) top = next;
  }
  float all = 0.0f;
  for (int64_t s = 0; s < splits_; ++s) {
    weight[s] = top == -kInfinity ? 0.0f : std::exp(peak[s * columns_] - top);
    all += weight[s] * total[s * columns_];
  }
  peak[0] = top;  // of the whole row, for normalize_block
  total[0] = all;
  call.lse[clip * rows_ + row] = top + std::log(all);
  for (int64_t s = 0; s < splits_; ++s) weight[s] = all == 0.0f ? 0.0f : weight[s] / all;
  const float* sum = partial.sum.get() + (clip * splits_ * rows_ + row) * width;
  kernels_.product({1, width, splits_, weight, splits_, 1, sum, rows_ * width, call.out + (clip * rows_ + row) * width,
                    width, false, nullptr});
}

// Replaces exp(score - peak of the block) in the stash by P.
void Attention::normalize_block(const Forward& call, const Partial& partial, int64_t clip, int64_t block) const {
  constexpr int64_t kSome = 256;
  alignas(64) float factor[kSome];
  const float* top = partial.peak.get() + clip * splits_ * columns_;
  const float* total = partial.total.get() + clip * splits_ * columns_;
  const float* from = partial.block_peak.get() + (clip * blocks_ + block) * columns_;
  const int64_t key = block * block_, count = std::min(block_, memory_.keys - key);
  float* p = call.stash + (clip * memory_.keys + key) * columns_;
  for (int64_t c = 0; c < columns_; c += kSome) {
    const int64_t columns = std::min(kSome, columns_ - c);
    kernels_.decay(from + c, top + c, columns, factor);
    for (int64_t i = 0; i < columns; ++i) {
      factor[i] = c + i < rows_ && total[c + i] != 0.0f ? factor[i] / total[c + i] : 0.0f;
    }
    kernels_.scale({p + c, count, columns, columns_}, factor);
  }
}

void Attention::backward(const Backward& call) const {
  const int64_t clips = memory_.clips, keys = memory_.keys, width = memory_.width;
  if (call.d_query != nullptr && keys == 0) clear(call.d_query, clips * rows_ * width);
  if (call.d_bias != nullptr && rows_ == 0) clear(call.d_bias, clips * keys);
  if (clips == 0 || rows_ == 0 || keys == 0) return;
  const auto delta = new_floats(clips * splits_ * columns_);
  const bool several = splits_ > 1;
  const auto sums = new_floats(several && call.d_query ? clips * splits_ * rows_ * width : 0);
  float* d_query = several && call.d_query ? sums.get() : call.d_query;
  const auto biases = new_floats(tiles_ > 1 && call.d_bias ? tiles_ * clips * keys : 0);
  float* d_bias = tiles_ > 1 && call.d_bias ? biases.get() : call.d_bias;

  const auto first_half = [&](const Unit& unit) {
    if (!call.stashed) probability_unit(call, unit);
    row_sums_unit(call, unit, delta.get());
  };
  const auto second_half = [&](const Unit& unit) { score_unit(call, unit, delta.get(), d_query, d_bias); };
  if (several) {
    for_units(first_half);
    for_units(second_half);
  } else {
    for_units([&](const Unit& unit) {
      first_half(unit);
      second_half(unit);
    });
  }
  if (several && call.d_query != nullptr) {
    const std::vector<float> ones(static_cast<size_t>(splits_), 1.0f);
    for_each_item(workers_, clips * rows_, [&](int64_t i, int64_t) {
      const float* sum = d_query + (i / rows_ * splits_ * rows_ + i % rows_) * width;
      kernels_.product({1, width, splits_, ones.data(), splits_, 1, sum, rows_ * width, call.d_query + i * width, width,
                        false, nullptr});
    });
  }
  if (tiles_ > 1 && call.d_bias != nullptr) {
    for (int64_t i = 0; i < clips * keys; ++i) {
      float total = 0.0f;
      for (int64_t tile = 0; tile < tiles_; ++tile) total += biases[static_cast<size_t>(tile * clips * keys + i)];
      call.d_bias[i] = total;
    }
  }
}

// Computes P of the unit from lse.
void Attention::probability_unit(const Backward& call, const Unit& unit) const {
  const int64_t width = memory_.width, columns = round_up(unit.rows, kColumns), stride = spread(columns);
  KeyReader reader(memory_, kernels_, block_, width * stride + 2 * columns);
  float* query = reader.take(width * stride);
  float* lse = reader.take(columns);
  float* unused = reader.take(columns);
  const int64_t first_row = unit.clip * rows_ + unit.first_row;
  kernels_.transpose(call.query + first_row * width, width, unit.rows, width, call.scale, query, stride);
  clear(lse, columns);
  std::copy(call.lse + first_row, call.lse + first_row + unit.rows, lse);
  clear(unused, columns);
  for (int64_t key = unit.first_key; key < unit.last_key; key += block_) {
    const int64_t count = std::min(block_, unit.last_key - key);
    const FloatRows keys = reader.keys(unit.clip, key, count);
    const Block p{call.stash + (unit.clip * memory_.keys + key) * columns_ + unit.first_row, count, columns, columns_};
    kernels_.product(
        {count, columns, width, keys.data, keys.stride, 1, query, stride, p.data, p.stride, false, nullptr});
    const float* bias = reader.bias(unit.clip, key, count);
    if (bias != nullptr) kernels_.peaks(p, bias, unused);
    kernels_.exponentials(p, lse, unused);
  }
}

// Writes the gradient of P to d_score, and adds up P times this gradient over the keys, less the gradient of lse.
void Attention::row_sums_unit(const Backward& call, const Unit& unit, float* delta) const {
  const int64_t width = memory_.width, columns = round_up(unit.rows, kColumns), stride = spread(columns);
  KeyReader reader(memory_, kernels_, block_, width * stride);
  float* grad_out = reader.take(width * stride);  // [width, rows]
  const int64_t first_row = unit.clip * rows_ + unit.first_row;
  if (call.grad_out != nullptr) {
    kernels_.transpose(call.grad_out + first_row * width, width, unit.rows, width, 1.0f, grad_out, stride);
  }
  float* total = delta + (unit.clip * splits_ + unit.split) * columns_ + unit.first_row;
  clear(total, columns);
  for (int64_t key = unit.first_key; key < unit.last_key; key += block_) {
    const int64_t count = std::min(block_, unit.last_key - key);
    const int64_t at = (unit.clip * memory_.keys + key) * columns_ + unit.first_row;
    if (call.grad_out == nullptr) {
      for (int64_t k = 0; k < count; ++k) clear(call.d_score + at + k * columns_, columns);
      continue;
    }
    const FloatRows values = reader.values(unit.clip, key, count);
    kernels_.product({count, columns, width, values.data, values.stride, 1, grad_out, stride, call.d_score + at,
                      columns_, false, nullptr});
    kernels_.weighted_sums({call.stash + at, count, columns, columns_}, call.d_score + at, total);
  }
  if (unit.split > 0 || call.grad_lse == nullptr) return;
  for (int64_t r = 0; r < unit.rows; ++r) {
    if (call.lse[first_row + r] != -kInfinity) total[r] -= call.grad_lse[first_row + r];
  }
}

void Attention::score_unit(const Backward& call, const Unit& unit, const float* delta, float* d_query,
                           float* d_bias) const {
  const int64_t width = memory_.width, columns = round_up(unit.rows, kColumns);
  KeyReader reader(memory_, kernels_, block_, columns);
  float* total = reader.take(columns);
  clear(total, columns);
  for (int64_t s = 0; s < splits_; ++s) {
    const float* part = delta + (unit.clip * splits_ + s) * columns_ + unit.first_row;
    for (int64_t c = 0; c < columns; ++c) total[c] += part[c];
  }
  const int64_t tile = unit.first_row / tile_;
  const int64_t first_row = (unit.clip * splits_ + unit.split) * rows_ + unit.first_row;
  for (int64_t key = unit.first_key; key < unit.last_key; key += block_) {
    const int64_t count = std::min(block_, unit.last_key - key);
    const int64_t at = (unit.clip * memory_.keys + key) * columns_ + unit.first_row;
    float* biases = d_bias == nullptr ? nullptr : d_bias + (tile * memory_.clips + unit.clip) * memory_.keys + key;
    kernels_.score_gradient({call.stash + at, count, columns, columns_}, call.d_score + at, total, call.scale,
                            unit.rows, biases);
    if (d_query == nullptr) continue;
    const FloatRows keys = reader.keys(unit.clip, key, count);
    kernels_.product({unit.rows, width, count, call.d_score + at, 1, columns_, keys.data, keys.stride,
                      d_query + first_row * width, width, key > unit.first_key, nullptr});
  }
}

void memory_gradient(const Memory& memory, const std::vector<LayerRows>& layers, const MemoryGradient& gradient,
                     const AttendKernels& kernels, const Workers& workers) {
  const int64_t width = memory.width, blocks = ceil_div(memory.keys, kMostBlock), slices = ceil_div(width, kSlice);
  const int64_t size = element_size(memory.type);
  const bool direct = memory.type == ElementType::kFloat32;
  // An item is some columns of some keys, so that its sums stay in the cache over all layers.
  for_each_item(workers, memory.clips * blocks * slices, [&](int64_t i, int64_t) {
    Scratch& scratch = Scratch::of_thread();
    scratch.start(kMostBlock * kSlice + 64);
    float* own = scratch.take(kMostBlock * kSlice);
    const int64_t clip = i / slices / blocks, key = i / slices % blocks * kMostBlock, column = i % slices * kSlice;
    const int64_t count = std::min(kMostBlock, memory.keys - key), columns = std::min(kSlice, width - column);
    const int64_t at = clip * memory.keys + key;
    const auto place = [&](void* tensor, int64_t row) {
      return static_cast<char*>(tensor) + ((at + row) * width + column) * size;
    };
    const bool in_place = direct && gradient.memory != nullptr;
    float* to = in_place ? reinterpret_cast<float*>(place(gradient.memory, 0)) : own;
    const int64_t stride = in_place ? width : kSlice;
    const auto finish = [&](void* tensor) {
      for (int64_t k = 0; k < count; ++k) {
        kernels.narrow(to + k * stride, 1.0f, columns, memory.type, place(tensor, k));
      }
    };
    const auto add = [&](const LayerRows& layer, const float* a, const float* b, bool more) {
      const int64_t stashed = stash_columns(layer.rows);
      kernels.product({count, columns, layer.rows, a + at * stashed, stashed, 1, b + clip * layer.rows * width + column,
                       width, to, stride, more, nullptr});
    };
    // The gradient of the position is the sum of d_key over layers. That of the memory has stash grad_out as well.
    const bool apart = gradient.position != nullptr;
    for (size_t l = 0; l < layers.size(); ++l) {
      add(layers[l], layers[l].d_score, layers[l].query, l > 0);
      if (!apart && layers[l].grad_out != nullptr) add(layers[l], layers[l].stash, layers[l].grad_out, true);
    }
    if (apart) {
      finish(gradient.position);
      if (gradient.memory == nullptr) return;
      for (const LayerRows& layer : layers) {
        if (layer.grad_out != nullptr) add(layer, layer.stash, layer.grad_out, true);
      }
    }
    if (!in_place) finish(gradient.memory);
  });
}

}  // namespace bridge_stg
