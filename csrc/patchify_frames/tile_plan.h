// How a ragged list of videos is cut into tiles, decided on the host.
#pragma once

#include <algorithm>
#include <cstdint>

#include "patchify_frames/patchify_tile.h"

namespace bridge_stg {

// Shared memory a tile aims at, so that several share a multiprocessor, and what it may take at most: what every
// architecture since sm_80 grants. ops/patchify_frames/api.py refuses what would take more.
constexpr int64_t kTileBytes = 40 << 10;
constexpr int64_t kTileMostBytes = 96 << 10;

inline int64_t tile_count(const TileVideo& video, const PatchLayout& layout) {
  const int64_t width = tile_width(static_cast<int>(layout.patch)), height = layout.merge * layout.patch;
  return (video.count + layout.temporal - 1) / layout.temporal * (video.out_height / height) *
         ((video.out_width + width - 1) / width);
}

inline int64_t tile_bytes(const TileVideo& video, const PatchLayout& layout) {
  return 4 * TileMemory::words(video, tile_width(static_cast<int>(layout.patch)),
                               static_cast<int>(layout.merge * layout.patch), static_cast<int>(layout.patch));
}

// Fills in the taps and how many source rows a tile holds at once. False if even four rows do not fit: the filter is
// hundreds of pixels wide, or the merge row thousands high.
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
