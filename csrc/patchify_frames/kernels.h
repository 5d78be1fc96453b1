// The kernels of patchify_frames over rows of pixels, of which each SIMD level has a table. All give the same bits.
#pragma once

#include <cstdint>

#include "common/cpu_features.h"
#include "patchify_frames/horizontal_plan.h"
#include "patchify_frames/normalization.h"

namespace bridge_stg {

struct PatchifyKernels {
  VectorShape shape;  // of the vectors that `horizontal` works with
  // Splits pixels of three bytes into three planes.
  void (*split)(const uint8_t* in, int64_t width, uint8_t* const out[3]);
  // Resizes `rows` rows of table.in pixels to rows of table.out pixels.
  void (*horizontal)(const ResizeTable& table, const HorizontalPlan& plan, const uint8_t* const* in,
                     uint8_t* const* out, int64_t rows);
  // Computes one output row from the `count` rows that weigh in.
  void (*vertical)(const int16_t* weights, int64_t count, int precision, const uint8_t* const* rows, int64_t width,
                   uint8_t* out);
  // Normalizes `count` pixels of one channel; `stream` writes past the cache.
  void (*normalize)(const Normalization& normalization, int channel, const uint8_t* in, int64_t count, void* out,
                    bool stream);
};

template <>
const PatchifyKernels KernelsOf<PatchifyKernels>::scalar;
template <>
const PatchifyKernels KernelsOf<PatchifyKernels>::avx2;
template <>
const PatchifyKernels KernelsOf<PatchifyKernels>::avx512;

}  // namespace bridge_stg
