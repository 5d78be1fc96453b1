// What is done to rows of pixels, once for each SIMD level. All levels give the same bits.
#pragma once

#include <cstdint>

#include "common/aligned_bytes.h"
#include "common/cpu_features.h"
#include "patchify_frames/normalization.h"
#include "patchify_frames/resize_tables.h"

namespace bridge_stg {

// Rows that kernels read or write have this many bytes of room after their last pixel (and after the last one that a
// filter may touch), so that whole vectors can be loaded and stored.
constexpr int64_t kRowSlack = 128;

// A horizontal pass laid out for vectors. A window is `outputs` neighbouring output pixels whose taps are picked by
// byte shuffles from loads of `bytes` bytes; tap pairs are multiplied and added as int16.
struct HorizontalPlan {
  enum class Kind {
    kPlain,     // scalar loops
    kOneLoad,   // one load a window holds all its taps
    kPairLoad,  // one load a window and tap pair
    kDot,       // taps are contiguous and many: one dot product an output pixel
  };
  Kind kind = Kind::kPlain;
  int64_t windows = 0, pairs = 0;
  AlignedBytes base;     // int32 [windows]: first input pixel; kDot: none
  AlignedBytes shuffle;  // uint8 [windows, pairs (kOneLoad) or 1, 4 outputs]: low byte, 0x80, low byte, 0x80
  AlignedBytes weights;  // int16 [windows, pairs, 2 outputs]; kDot: [out, padded taps]
  int64_t padded_taps = 0;
};

struct RowKernels {
  // Three bytes a pixel to three planes.
  void (*split)(const uint8_t* in, int64_t width, uint8_t* const out[3]);
  HorizontalPlan (*plan)(const ResizeTable& table);
  // `rows` rows of table.in pixels to rows of table.out pixels.
  void (*horizontal)(const ResizeTable& table, const HorizontalPlan& plan, const uint8_t* const* in,
                     uint8_t* const* out, int64_t rows);
  // One output row from the `count` rows that weigh in.
  void (*vertical)(const int16_t* weights, int64_t count, int precision, const uint8_t* const* rows, int64_t width,
                   uint8_t* out);
  // `count` pixels of one channel to values; `stream` writes past the cache.
  void (*normalize)(const Normalization& normalization, int channel, const uint8_t* in, int64_t count, void* out,
                    bool stream);
};

extern const RowKernels kScalarRows;
#if defined(__x86_64__)
extern const RowKernels kAvx2Rows;
extern const RowKernels kAvx512Rows;
#endif

inline const RowKernels& row_kernels(SimdLevel level) {
#if defined(__x86_64__)
  if (level == SimdLevel::kAvx512) return kAvx512Rows;
  if (level == SimdLevel::kAvx2) return kAvx2Rows;
#endif
  (void)level;
  return kScalarRows;
}

// Shared by the vector levels: a plan of windows of `outputs` pixels in loads of `bytes` bytes, or kDot where the
// filter is too wide for that.
HorizontalPlan plan_windows(const ResizeTable& table, int64_t outputs, int64_t bytes);

}  // namespace bridge_stg
