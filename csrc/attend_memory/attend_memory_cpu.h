// attend_memory on the CPU, free of torch: blocks of keys, of which every query row of a tile makes use at once.
//
// Work is cut into units by shapes alone, and what units add up is summed in their order: results do not depend on
// how many threads run them.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "attend_memory/kernels.h"

namespace bridge_stg {

// Runs task(first, last) over parts of 0..units-1.
using Parallel = std::function<void(int64_t units, const std::function<void(int64_t, int64_t)>& task)>;

// [clips, keys, width] by strides, elements of a row side by side.
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

// How many columns a stash for `rows` query rows has: [clips, keys, stash_columns].
inline int64_t stash_columns(int64_t rows) { return round_up(rows, kColumns); }

struct Forward {
  int64_t rows;
  float scale;
  const float* query;  // [clips, rows, width]
  float* out;          // [clips, rows, width]
  float* lse;          // [clips, rows]
  float* mass;         // [clips, keys] or null; needs a stash
  float* stash;        // P, or null
};

// Gradients of one call; those that are null are left out.
struct Backward {
  int64_t rows;
  float scale;
  const float* query;     // [clips, rows, width]
  const float* lse;       // [clips, rows]
  float* stash;           // P
  bool stashed;           // whether the stash holds it already; else it is taken again
  const float* grad_out;  // [clips, rows, width] or null for zeros
  const float* grad_lse;  // [clips, rows] or null
  float* d_score;         // shape of the stash: scale times the gradient of the scores
  float* d_query;         // [clips, rows, width]
  float* d_bias;          // [clips, keys]
};

// What a layer adds to the gradient of the memory: d_key = d_score query, d_memory = d_key + stash grad_out.
struct LayerRows {
  int64_t rows;
  const float* query;
  const float* grad_out;  // or null
  const float* stash;
  const float* d_score;
};

// Dense [clips, keys, width] of the memory's type; either may be null.
struct MemoryGradient {
  void* memory;
  void* position;
};

class Attention {
 public:
  Attention(const Memory& memory, int64_t rows, const AttendKernels& kernels, const Parallel& parallel);

  // Whether forward and backward of a clip are one unit of work.
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
  const Parallel& parallel_;
  int64_t rows_, columns_;                  // R, and the columns of a stash
  int64_t tile_, tiles_;                    // query rows of a unit
  int64_t block_, blocks_, split_, splits_;  // keys of a block, and of a unit
};

// Sums what layers left, key by key.
void memory_gradient(const Memory& memory, const std::vector<LayerRows>& layers, const MemoryGradient& gradient,
                     const AttendKernels& kernels, const Parallel& parallel);

}  // namespace bridge_stg
