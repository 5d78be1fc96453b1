// The matrix product of kernels.h. Sums of a tile stay in registers, and operands are read where they lie.
#pragma once

#include "attend_memory/kernels.h"
#include "common/simd_math.h"

namespace bridge_stg {
namespace {

// A tile is kRows rows of kVectors vectors: as many sums as there are registers, less those for b and one for a.
template <int kVectors>
constexpr int tile_rows() {
  return kRegisters == 32 ? (kVectors <= 2 ? 12 : 6) : (kVectors == 1 ? 8 : 6);
}

constexpr int kMaxVectors = kRegisters == 32 ? 4 : 2;
constexpr int kMaxRows = 12;

constexpr int64_t kLineFloats = 16;

// Computes the tile at `a`, `b`, `c` of `p`. With kPartial its one vector has `rest` columns; with kAhead it prefetches
// the rows of a that follow its own.
template <int kRows, int kVectors, bool kPartial, bool kAhead>
void product_tile(const Product& p, const float* a, const float* b, float* c, const float* keep, int64_t rest) {
  Vec sums[kRows][kVectors];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[i][j] = splat(0.0f);
  }
  for (int64_t k = 0; k < p.steps; ++k) {
    if (kAhead && k % kLineFloats == 0) {
      for (int i = 0; i < kRows; ++i) __builtin_prefetch(a + (kRows + i) * p.a_row, 0, 2);
    }
    Vec y[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) y[j] = kPartial ? load(b, rest) : load(b + j * kWidth);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const Vec x = splat(a[i * p.a_row]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[i][j] = multiply_add(x, y[j], sums[i][j]);
    }
    a += p.a_step;
    b += p.b_step;
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    float* to = c + i * p.c_row;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      Vec value = sums[i][j];
      if (p.add) {
        const Vec old = kPartial ? load(to, rest) : load(to + j * kWidth);
        value = keep == nullptr ? value + old : multiply_add(splat(keep[i]), old, value);
      }
      if (kPartial) {
        store(to, value, rest);
      } else {
        store(to + j * kWidth, value);
      }
    }
  }
}

using Tile = void (*)(const Product&, const float*, const float*, float*, const float*, int64_t);

// The tiles of one width, by their rows.
template <int kVectors, bool kPartial, bool kAhead>
struct Tiles {
  Tile of[kMaxRows + 1] = {};

  template <int kRows>
  constexpr void add() {
    if constexpr (kRows > 0) {
      of[kRows] = product_tile<kRows, kVectors, kPartial, kAhead>;
      add<kRows - 1>();
    }
  }

  constexpr Tiles() { add<tile_rows<kVectors>()>(); }
};

// Computes all rows of kVectors vectors of columns, from column `first` on.
template <int kVectors, bool kPartial, bool kAhead>
void product_panel(const Product& p, int64_t first, int64_t rest) {
  static constexpr Tiles<kVectors, kPartial, kAhead> tiles;
  constexpr int64_t kRows = tile_rows<kVectors>();
  // Tiles have nearly equal heights, because a low tile leaves the multipliers waiting.
  const int64_t count = (p.rows + kRows - 1) / kRows;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t row = t * p.rows / count, end = (t + 1) * p.rows / count;
    tiles.of[end - row](p, p.a + row * p.a_row, p.b + first, p.c + row * p.c_row + first,
                        p.keep == nullptr ? nullptr : p.keep + row, rest);
  }
}

template <int kVectors, bool kPartial = false>
int64_t next_panel(const Product& p, int64_t first, int64_t rest = 0) {
  // The first panel reads `a` from memory. Prefetching pays where the elements of its rows lie side by side.
  if (first == 0 && p.a_step == 1) {
    product_panel<kVectors, kPartial, true>(p, first, rest);
  } else {
    product_panel<kVectors, kPartial, false>(p, first, rest);
  }
  return first + kVectors * kWidth;
}

void product_columns(const Product& p) {
  int64_t first = 0;
  while (p.columns - first >= kMaxVectors * kWidth) first = next_panel<kMaxVectors>(p, first);
  if constexpr (kMaxVectors == 4) {
    if (p.columns - first >= 3 * kWidth) {
      first = next_panel<3>(p, first);
    } else if (p.columns - first >= 2 * kWidth) {
      first = next_panel<2>(p, first);
    }
  }
  if (p.columns - first >= kWidth) first = next_panel<1>(p, first);
  if (first < p.columns) next_panel<1, true>(p, first, p.columns - first);
}

// Sums are cut after kSteps, so that the panel of b stays in the cache; the parts also round less than one long sum.
constexpr int64_t kSteps = 256;

void product(const Product& p) {
  Product part = p;
  for (int64_t done = 0; done == 0 || done < p.steps; done += kSteps) {
    part.steps = smaller(kSteps, p.steps - done);
    product_columns(part);
    part.a += kSteps * p.a_step;
    part.b += kSteps * p.b_step;
    part.add = true;
    part.keep = nullptr;
  }
}

}  // namespace
}  // namespace bridge_stg
