// How the host cuts videos into tiles.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/aligned_bytes.h"
#include "patchify_frames/patchify_tile.h"
#include "patchify_frames/video_view.h"

namespace bridge_stg {

// The shared memory that a tile aims at, so that several tiles share a multiprocessor, and the most that it may take,
// which every architecture since sm_80 grants. ops/patchify_frames/registration.py refuses calls that would take more.
constexpr int64_t kTileBytes = 40 << 10;
constexpr int64_t kTileMostBytes = 96 << 10;

inline TileVideo tile_video(const VideoView& video) {
  TileVideo made{};
  made.pixels = video.pixels;
  made.frame_index = video.frame_index;
  made.frame_stride = video.frame_stride;
  made.channel_stride = video.channel_stride;
  made.row_stride = video.row_stride;
  made.pixel_stride = video.pixel_stride;
  made.index_stride = video.index_stride;
  made.frames = video.frames;
  made.count = video.count;
  made.height = static_cast<int32_t>(video.height);
  made.width = static_cast<int32_t>(video.width);
  made.out_height = static_cast<int32_t>(video.out_height);
  made.out_width = static_cast<int32_t>(video.out_width);
  return made;
}

inline int64_t tile_count(const TileVideo& video, const PatchLayout& layout) {
  const int64_t width = tile_width(static_cast<int>(layout.patch)), height = layout.merge * layout.patch;
  return ceil_div(video.count, layout.temporal) * (video.out_height / height) * ceil_div(video.out_width, width);
}

inline int64_t tile_bytes(const TileVideo& video, const PatchLayout& layout) {
  return 4 * TileMemory::words(video, tile_width(static_cast<int>(layout.patch)),
                               static_cast<int>(layout.merge * layout.patch), static_cast<int>(layout.patch));
}

// Sets the taps and the number of source rows that a tile holds at once. Returns false if four rows do not fit: the
// filter is hundreds of pixels wide, or the merge row thousands of pixels high.
inline bool plan_tile(TileVideo& video, const PatchLayout& layout, bool bicubic) {
  const int height = static_cast<int>(layout.merge * layout.patch);
  video.x = tile_axis(video.width, video.out_width, bicubic);
  video.y = tile_axis(video.height, video.out_height, bicubic);
  const int64_t span = (int64_t{height} * video.height + video.out_height - 1) / video.out_height + video.y.taps + 1;
  const int64_t needed = (std::min<int64_t>(span, video.height) + 3) / 4 * 4;
  video.chunk_rows = static_cast<int32_t>(needed);
  video.chunked = 0;
  if (tile_bytes(video, layout) <= kTileBytes) return true;
  video.chunked = 1;
  video.chunk_rows = 0;
  const int64_t tables = tile_bytes(video, layout), row = 4 * tile_width(static_cast<int>(layout.patch));
  const int64_t room = std::max(kTileBytes - tables, std::min(kTileMostBytes - tables, 16 * row));
  video.chunk_rows = static_cast<int32_t>(std::min(needed, room / row / 4 * 4));
  if (video.chunk_rows >= needed) video.chunked = 0;
  return video.chunk_rows >= 4;
}

}  // namespace bridge_stg
