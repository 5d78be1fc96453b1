// A video as the kernels of patchify_frames read it.
#pragma once

#include <cstdint>

namespace bridge_stg {

// Strides are in bytes and may be anything.
struct VideoView {
  const uint8_t* pixels = nullptr;
  int64_t frames = 0, height = 0, width = 0;
  int64_t frame_stride = 0, channel_stride = 0, row_stride = 0, pixel_stride = 0;
  const int64_t* frame_index = nullptr;  // the source frames asked for; null: all in order
  int64_t index_stride = 1;
  int64_t count = 0;  // frames asked for
  int64_t out_height = 0, out_width = 0;
};

}  // namespace bridge_stg
