// attend_memory and its backward on the CPU, free of torch. They go over blocks of keys, and use each block for all
// query rows of a tile while it is in the cache.
//
// Work is cut into units by shapes alone, and the sums of units are added in the order of the units. So results do not
// depend on the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "attend_memory/kernels.h"
#include "common/parallel.h"

namespace bridge_stg {

// Rows [clips, keys, width] by strides; the elements of a row lie side by side.
struct KeyRows {
  const void* data = nullptr;
  int64_t clip_stride = 0, row_stride = 0;
};

// The keys of all clips. `position`, `bias` and `visible` may be null; the last two are dense [clips, keys].
struct Memory {
  ElementType type;
  int64_t clips, keys, width;
  KeyRows value, position;
  const float* bias;
  const bool* visible;
};

// A stash keeps the probabilities P for the backward: [clips, keys, stash_columns(rows)].
inline int64_t stash_columns(int64_t rows) { return round_up(rows, kColumns); }

// The inputs and outputs of one call.
struct Forward {
  int64_t rows;
  float scale;
  const float* query;  // [clips, rows, width]
  float* out;          // [clips, rows, width]
  float* lse;          // [clips, rows]
  float* mass;         // [clips, keys] or null; needs a stash
  float* stash;        // or null
};

// The inputs of one backward call and its gradients; a gradient whose pointer is null is not computed.
struct Backward {
  int64_t rows;
  float scale;
  const float* query;  // [clips, rows, width]
  const float* lse;    // [clips, rows]
  float* stash;
  bool stashed;           // whether the stash holds P already; if not, P is computed from lse
  const float* grad_out;  // [clips, rows, width] or null for zeros
  const float* grad_lse;  // [clips, rows] or null
  float* d_score;         // scale times the gradient of the scores, in the shape of the stash
  float* d_query;         // [clips, rows, width]
  float* d_bias;          // [clips, keys]
};

// One layer's part in the gradient of the memory: d_key = d_score query and d_memory = d_key + stash grad_out.
struct LayerRows {
  int64_t rows;
  const float* query;
  const float* grad_out;  // or null
  const float* stash;
  const float* d_score;
};

// Gradients [clips, keys, width], contiguous, of the memory's type; either may be null.
struct MemoryGradient {
  void* memory;
  void* position;
};

class Attention {
 public:
  Attention(const Memory& memory, int64_t rows, const AttendKernels& kernels, const Workers& workers);

  // Whether a clip is one unit of work.
  bool whole_clips() const { return tiles_ == 1 && splits_ == 1; }

  void forward(const Forward& call) const;
  void backward(const Backward& call) const;

 private:
  struct Unit {
    int64_t clip, split, first_row, rows, first_key, last_key;
  };

  struct Partial;

  Unit unit(int64_t number) const;
  int64_t units() const { return memory_.clips * tiles_ * splits_; }
  void for_units(const std::function<void(const Unit&)>& task) const;
  void attend_unit(const Forward& call, const Unit& unit, const Partial& partial) const;
  void merge_row(const Forward& call, const Partial& partial, int64_t clip, int64_t row) const;
  void normalize_block(const Forward& call, const Partial& partial, int64_t clip, int64_t block) const;
  void probability_unit(const Backward& call, const Unit& unit) const;
  void row_sums_unit(const Backward& call, const Unit& unit, float* delta) const;
  void score_unit(const Backward& call, const Unit& unit, const float* delta, float* d_query, float* d_bias) const;

  const Memory& memory_;
  const AttendKernels& kernels_;
  const Workers& workers_;
  int64_t rows_, columns_;                   // query rows of a clip, and columns of a stash
  int64_t tile_, tiles_;                     // query rows of a unit, and units side by side
  int64_t block_, blocks_, split_, splits_;  // keys of a block and of a unit, and how many there are of a clip
};

// Sums the parts of all layers in the gradient of the memory they share.
void memory_gradient(const Memory& memory, const std::vector<LayerRows>& layers, const MemoryGradient& gradient,
                     const AttendKernels& kernels, const Workers& workers);

}  // namespace bridge_stg
