// Blocks of keys as float32, and the scratch memory of a thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "attend_memory/attend_memory_cpu.h"

namespace bridge_stg {

// The scratch memory of a thread. It lives from call to call, because fresh memory costs page faults.
class Scratch {
 public:
  // Returns `count` floats on a cache-line boundary, of those that the last `start` asked for.
  float* take(int64_t count) {
    float* taken = data_ + used_;
    used_ += round_up(count, kCacheLine / 4);
    return taken;
  }

  // Takes back all that was taken, and makes room for `floats` floats.
  void start(int64_t floats) {
    if (floats > size_) {
      bytes_ = AlignedBytes(4 * floats);
      data_ = reinterpret_cast<float*>(bytes_.data());
      size_ = floats;
    }
    used_ = 0;
  }

  static Scratch& of_thread() {
    thread_local Scratch scratch;
    return scratch;
  }

  // A second one, for a caller of functions that use the first.
  static Scratch& outer_of_thread() {
    thread_local Scratch scratch;
    return scratch;
  }

 private:
  AlignedBytes bytes_;
  float* data_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

struct FloatRows {
  const float* data;
  int64_t stride;
};

// Rows whose distance is a multiple of this many bytes fall into the same few cache sets.
constexpr int64_t kAlias = 2048;

// The stride of rows of `width` floats, with a gap where they would otherwise alias.
inline int64_t spread_width(int64_t width) {
  const int64_t whole = round_up(width, kColumns);
  return whole % (kAlias / 4) == 0 ? whole + kColumns : whole;
}

// Reads blocks of keys. float32 keys without a mask are read where they lie, others through a copy.
class KeyReader {
 public:
  // Takes scratch memory of the thread for blocks of `block` keys, with room for `floats` more.
  KeyReader(const Memory& memory, const AttendKernels& kernels, int64_t block, int64_t floats)
      : memory_(memory), kernels_(kernels), scratch_(Scratch::of_thread()) {
    const int64_t rows = block * spread_width(memory.width);
    scratch_.start(2 * rows + block + floats + kSlack);
    value_ = take(rows);
    key_ = take(rows);
    bias_ = take(block);
  }

  float* take(int64_t count) { return scratch_.take(count); }

  FloatRows values(int64_t clip, int64_t first, int64_t count) const {
    if (memory_.type == ElementType::kFloat32 && memory_.visible == nullptr) {
      const float* data = static_cast<const float*>(memory_.value.data);
      return {data + clip * memory_.value.clip_stride + first * memory_.value.row_stride, memory_.value.row_stride};
    }
    return copy(clip, first, count, false, value_);
  }

  // `values` must be the result of values() for the same keys.
  FloatRows keys(int64_t clip, int64_t first, int64_t count, FloatRows values) const {
    return memory_.position.data == nullptr ? values : copy(clip, first, count, true, key_);
  }

  FloatRows keys(int64_t clip, int64_t first, int64_t count) const {
    return memory_.position.data == nullptr ? values(clip, first, count) : copy(clip, first, count, true, key_);
  }

  // Returns the bias of each key's scores, -inf for a masked key; null where there is neither bias nor mask.
  const float* bias(int64_t clip, int64_t first, int64_t count) const {
    if (memory_.bias == nullptr && memory_.visible == nullptr) return nullptr;
    const int64_t at = clip * memory_.keys + first;
    for (int64_t k = 0; k < count; ++k) {
      const bool seen = memory_.visible == nullptr || memory_.visible[at + k];
      const float given = memory_.bias == nullptr ? 0.0f : memory_.bias[at + k];
      bias_[k] = seen ? given : -std::numeric_limits<float>::infinity();
    }
    return bias_;
  }

 private:
  static const char* row(const KeyRows& rows, int64_t clip, int64_t key, int64_t size) {
    return static_cast<const char*>(rows.data) + (clip * rows.clip_stride + key * rows.row_stride) * size;
  }

  FloatRows copy(int64_t clip, int64_t first, int64_t count, bool placed, float* to) const {
    const int64_t size = element_size(memory_.type), stride = spread_width(memory_.width);
    for (int64_t k = first; k < first + count; ++k, to += stride) {
      if (memory_.visible != nullptr && !memory_.visible[clip * memory_.keys + k]) {
        std::memset(to, 0, static_cast<size_t>(memory_.width) * 4);
        continue;
      }
      kernels_.widen(memory_.type, row(memory_.value, clip, k, size),
                     placed ? row(memory_.position, clip, k, size) : nullptr, memory_.width, to);
    }
    return {to - count * stride, stride};
  }

  static constexpr int64_t kSlack = 256;  // what rounding up to cache lines adds

  const Memory& memory_;
  const AttendKernels& kernels_;
  Scratch& scratch_;
  float *value_, *key_, *bias_;
};

}  // namespace bridge_stg
