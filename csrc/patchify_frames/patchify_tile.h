// What one thread block of patchify_frames does on CUDA. It computes a tile: some patch columns of one merge row of one
// temporal group. The phases are plain functions of (thread, threads); barriers separate them in the kernel, and unit
// tests run them one after another.
//
// The arithmetic is that of ATen's `upsample_gen2d_aa_out_frame` (aten/src/ATen/native/cuda/UpSampleBilinear2d.cu),
// which the Hugging Face processors run on CUDA: weights in float32, taps added in order along x, then along y.
#pragma once

#include <cmath>
#include <cstdint>

#include "patchify_frames/patch_layout.h"

namespace bridge_stg {

// One axis of a resize in source pixels.
struct TileAxis {
  float scale;    // of an output pixel
  float inverse;  // 1 / scale where that is a reduction, else 1
  float support;  // half the width of the filter
  int32_t taps;   // room for weights an output pixel
};

inline TileAxis tile_axis(int in, int out, bool bicubic) {
  TileAxis axis;
  axis.scale = static_cast<float>(in) / static_cast<float>(out);
  axis.inverse = axis.scale >= 1.0f ? static_cast<float>(1.0 / axis.scale) : 1.0f;
  axis.support = (bicubic ? 2.0f : 1.0f) * (axis.scale >= 1.0f ? axis.scale : 1.0f);
  axis.taps = static_cast<int32_t>(std::ceil(axis.support)) * 2 + 1;
  return axis;
}

// A VideoView as the kernel reads it, with its place in the output and the sizes of its tiles.
struct TileVideo {
  const uint8_t* pixels;
  const int64_t* frame_index;  // null: all frames in order; values outside are clamped
  int64_t frame_stride, channel_stride, row_stride, pixel_stride, index_stride;
  int64_t frames, count;
  int64_t first_row;    // of the output
  int64_t first_block;  // of the launch
  int32_t height, width, out_height, out_width;
  TileAxis y, x;
  int32_t chunk_rows;  // source rows that the tile holds at once
  int32_t chunked;     // whether that may be fewer than it needs
};

struct TileNormalization {
  float mean[3], std[3], reciprocal[3];
  bool reciprocal_is_exact;
};

// The output pixels across a tile: whole patches, at least 64 pixels.
BRIDGE_STG_HOST_DEVICE constexpr int tile_width(int patch) { return (64 + patch - 1) / patch * patch; }

// The places of a tile's data in shared memory, which is counted in words of 4 bytes.
struct TileMemory {
  int width, height;  // of the tile in output pixels
  int patches;        // of the tile
  float* weights_x;   // [x.taps, width]
  float* weights_y;   // [height, y.taps]
  float* rows;        // [chunk_rows, width] source rows after the horizontal pass
  float* sums;        // [height, width] unfinished vertical sums; only if chunked
  int* start_x;       // [width]
  int* count_x;
  int* start_y;  // [height]
  int* count_y;
  int* patch_row;  // [patches] output row within the merge row; negative: beyond the frame

  BRIDGE_STG_HOST_DEVICE static int64_t words(const TileVideo& video, int width, int height, int patch) {
    return int64_t{video.x.taps} * width + int64_t{video.y.taps} * height + int64_t{video.chunk_rows} * width +
           (video.chunked ? int64_t{width} * height : 0) + 2 * (width + height) + width / patch * (height / patch);
  }

  BRIDGE_STG_HOST_DEVICE TileMemory(const TileVideo& video, int width_, int height_, int patch, float* memory)
      : width(width_), height(height_), patches(width_ / patch * (height_ / patch)) {
    weights_x = memory;
    weights_y = weights_x + video.x.taps * width;
    rows = weights_y + video.y.taps * height;
    sums = rows + video.chunk_rows * width;
    start_x = reinterpret_cast<int*>(sums + (video.chunked ? width * height : 0));
    count_x = start_x + width;
    start_y = count_x + width;
    count_y = start_y + height;
    patch_row = count_y + height;
  }
};

BRIDGE_STG_HOST_DEVICE float tile_filter(float x, bool bicubic) {
  if (x < 0) x = -x;
  if (!bicubic) return x < 1 ? 1 - x : 0.0f;
  const float a = -0.5f;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0f;
}

// Writes the weights of output pixel i along one axis of `in` source pixels, `step` words apart.
BRIDGE_STG_HOST_DEVICE void tile_weights(int i, int in, const TileAxis& axis, bool bicubic, float* weights, int step,
                                         int* start, int* count) {
  const float center = axis.scale * (i + 0.5f);
  const int low = static_cast<int>(center - axis.support + 0.5f);
  const int first = low > 0 ? low : 0;
  const int high = static_cast<int>(center + axis.support + 0.5f);
  const int taps = (high < in ? high : in) - first;
  const float offset = first - center;
  float total = 0.0f;
  BRIDGE_STG_UNROLL(1)
  for (int j = 0; j < taps; ++j) {
    const float weight = tile_filter((j + offset + 0.5f) * axis.inverse, bicubic);
    weights[j * step] = weight;
    total += weight;
  }
  if (total != 0.0f) {
    BRIDGE_STG_UNROLL(1)
    for (int j = 0; j < taps; ++j) weights[j * step] /= total;
  }
  *start = first;
  *count = taps;
}

// Phase 1 computes the weights of the tile, whose first output pixel is (x0, y0), and the output rows of its patches.
BRIDGE_STG_HOST_DEVICE void tile_tables(const TileVideo& video, const TileMemory& memory, const PatchLayout& layout,
                                        int x0, int y0, bool bicubic, int thread, int threads) {
  const int P = static_cast<int>(layout.patch), merge = static_cast<int>(layout.merge), across = memory.width / P;
  for (int i = thread; i < memory.patches; i += threads) {
    const int gx = x0 / P + i % across;
    memory.patch_row[i] = gx < video.out_width / P ? PatchLayout::row_within(i / across, gx, merge) : -1;
  }
  for (int i = thread; i < memory.width + memory.height; i += threads) {
    const bool along_x = i < memory.width;
    const int pixel = along_x ? i : i - memory.width;
    int start = 0, count = 0;
    if (along_x && x0 + pixel < video.out_width) {
      tile_weights(x0 + pixel, video.width, video.x, bicubic, memory.weights_x + pixel, memory.width, &start, &count);
    } else if (!along_x) {
      tile_weights(y0 + pixel, video.height, video.y, bicubic, memory.weights_y + pixel * video.y.taps, 1, &start,
                   &count);
    }
    (along_x ? memory.start_x : memory.start_y)[pixel] = start;
    (along_x ? memory.count_x : memory.count_y)[pixel] = count;
  }
}

// Phase 2 takes source rows first..first+chunk_rows-1 of one plane through the horizontal pass, four at a time.
template <int kWidth>
BRIDGE_STG_HOST_DEVICE void tile_rows(const TileVideo& video, const TileMemory& memory, const uint8_t* plane, int first,
                                      int last, int thread, int threads) {
  const int width = kWidth > 0 ? kWidth : memory.width;
  const int rows = (last - first < video.chunk_rows ? last - first : video.chunk_rows);
  for (int i = thread; i < (rows + 3) / 4 * width; i += threads) {
    const int x = i % width, row = i / width * 4;
    const int taps = memory.count_x[x];
    const int64_t column = memory.start_x[x] * video.pixel_stride;
    const uint8_t* pixels[4];
    float sums[4];
    BRIDGE_STG_UNROLL(4)
    for (int k = 0; k < 4; ++k) {
      const int y = first + row + k < video.height ? first + row + k : video.height - 1;
      pixels[k] = plane + y * video.row_stride + column;
      sums[k] = 0.0f;
    }
    const float* weight = memory.weights_x + x;
    BRIDGE_STG_UNROLL(1)
    for (int j = 0; j < taps; ++j, weight += width) {
      BRIDGE_STG_UNROLL(4)
      for (int k = 0; k < 4; ++k) {
        sums[k] = fmaf(static_cast<float>(*pixels[k]), *weight, sums[k]);
        pixels[k] += video.pixel_stride;
      }
    }
    BRIDGE_STG_UNROLL(4)
    for (int k = 0; k < 4; ++k) {
      if (row + k < video.chunk_rows) memory.rows[(row + k) * width + x] = sums[k];
    }
  }
}

BRIDGE_STG_HOST_DEVICE float tile_value(float pixel, const TileNormalization& normalization, int channel) {
  const float x = pixel - normalization.mean[channel];
  if (!normalization.reciprocal_is_exact) return x / normalization.std[channel];
  const float quotient = x * normalization.reciprocal[channel];
  return fmaf(fmaf(-quotient, normalization.std[channel], x), normalization.reciprocal[channel], quotient);
}

// Phase 3 adds the taps of the vertical pass that lie in the source rows of phase 2. After the last chunk of rows it
// normalizes, and store(position in the output, value) casts and writes.
template <int kPatch, typename Store>
BRIDGE_STG_HOST_DEVICE void tile_values(const TileVideo& video, const TileMemory& memory, const PatchLayout& layout,
                                        const TileNormalization& normalization, int64_t merge_row, int channel, int dt,
                                        int first, bool is_first, bool is_last, int thread, int threads,
                                        const Store& store) {
  const int P = kPatch > 0 ? kPatch : static_cast<int>(layout.patch), across = memory.width / P;
  for (int patch = 0; patch < memory.patches; ++patch) {
    if (memory.patch_row[patch] < 0) continue;
    const int mh = patch / across;
    const int64_t base =
        (merge_row + memory.patch_row[patch]) * layout.columns() + (channel * layout.temporal + dt) * P * P;
    for (int i = thread; i < P * P; i += threads) {
      const int y = mh * P + i / P, x = patch % across * P + i % P;
      const int offset = memory.start_y[y] - first;  // of the first tap from the first row held
      const int begin = offset < 0 ? -offset : 0;
      const int room = video.chunk_rows - offset;
      const int end = memory.count_y[y] < room ? memory.count_y[y] : room;
      const float* weights = memory.weights_y + y * video.y.taps;
      float sum = is_first ? 0.0f : memory.sums[y * memory.width + x];
      BRIDGE_STG_UNROLL(4)
      for (int j = begin; j < end; ++j) sum = fmaf(memory.rows[(offset + j) * memory.width + x], weights[j], sum);
      if (is_last) {
        const float pixel = rintf(fminf(fmaxf(sum, 0.0f), 255.0f));
        store(base + i, tile_value(pixel, normalization, channel));
      } else {
        memory.sums[y * memory.width + x] = sum;
      }
    }
  }
}

// Computes the whole tile. `barrier()` waits for all threads.
template <int kPatch, typename Store, typename Barrier>
BRIDGE_STG_HOST_DEVICE void patchify_tile(const TileVideo& video, const PatchLayout& layout,
                                          const TileNormalization& normalization, bool bicubic, int64_t tile,
                                          float* shared, int thread, int threads, const Store& store,
                                          const Barrier& barrier) {
  const int P = kPatch > 0 ? kPatch : static_cast<int>(layout.patch);
  const int width = tile_width(P), height = static_cast<int>(layout.merge) * P;
  const int strips = (video.out_width + width - 1) / width, block_rows = video.out_height / height;
  const int strip = static_cast<int>(tile % strips);
  const int block_row = static_cast<int>(tile / strips % block_rows);
  const int64_t group = tile / strips / block_rows;
  const int64_t merge_row =
      video.first_row + layout.merge_row(group, block_row, video.out_height / P, video.out_width / P);
  const TileMemory memory(video, width, height, P, shared);

  tile_tables(video, memory, layout, strip * width, block_row * height, bicubic, thread, threads);
  barrier();
  const int top = memory.start_y[0];
  const int bottom = memory.start_y[height - 1] + memory.count_y[height - 1];
  for (int dt = 0; dt < static_cast<int>(layout.temporal); ++dt) {
    int64_t frame = layout.frame(group, dt, video.count);
    if (video.frame_index != nullptr) {
      frame = video.frame_index[frame * video.index_stride];
      frame = frame < 0 ? 0 : frame < video.frames ? frame : video.frames - 1;
    }
    for (int channel = 0; channel < 3; ++channel) {
      const uint8_t* plane = video.pixels + frame * video.frame_stride + channel * video.channel_stride;
      for (int first = top; first < bottom; first += video.chunk_rows) {
        tile_rows<kPatch == 0 ? 0 : tile_width(kPatch)>(video, memory, plane, first, bottom, thread, threads);
        barrier();
        tile_values<kPatch>(video, memory, layout, normalization, merge_row, channel, dt, first, first == top,
                            first + video.chunk_rows >= bottom, thread, threads, store);
        barrier();
      }
    }
  }
}

}  // namespace bridge_stg
