// patchify_frames on the CPU, free of torch: bands of one patch row, from source pixels to output values.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "patchify_frames/patch_layout.h"
#include "patchify_frames/normalization.h"
#include "patchify_frames/kernels.h"

namespace bridge_stg {

// A video and the frames asked of it. Strides are in bytes and may be anything.
struct VideoView {
  const uint8_t* pixels = nullptr;
  int64_t frames = 0, height = 0, width = 0;
  int64_t frame_stride = 0, channel_stride = 0, row_stride = 0, pixel_stride = 0;
  const int64_t* frame_index = nullptr;  // values in 0..frames-1; null: all frames in order
  int64_t index_stride = 1;
  int64_t count = 0;  // frames asked for
  int64_t out_height = 0, out_width = 0;
};

// One axis of a resize. `table` is empty (out = 0) where the size does not change.
struct ResizeAxis {
  ResizeTable table;
  HorizontalPlan plan;
};

// Patchifies a ragged list of videos into consecutive output rows. The work is cut into units, one patch row of one
// temporal group each; units may run in any order and on any thread. Apart from tables, the memory used is that of
// the source and output rows of one unit, for each thread.
class FramePatcher {
 public:
  FramePatcher(std::vector<VideoView> videos, PatchLayout layout, Interpolation interpolation,
               Normalization normalization, SimdLevel level);

  int64_t units() const { return first_unit_.back(); }
  int64_t rows() const { return first_row_.back(); }
  int64_t columns() const { return layout_.columns(); }

  // Writes the output rows of units first..last-1; `out` is the whole output, [rows(), columns()] of the
  // normalization's type.
  void run(int64_t first, int64_t last, void* out) const;

 private:
  struct Scratch;

  const ResizeAxis* axis(int64_t in, int64_t out, Interpolation interpolation, bool horizontal);
  void run_video(size_t video, int64_t first, int64_t last, uint8_t* out) const;
  void stage_row(const VideoView& view, int64_t frame, int64_t y, uint8_t* const planes[3]) const;
  void load_rows(size_t video, Scratch& scratch, int64_t first, int64_t last) const;
  void write_patches(size_t video, Scratch& scratch, int64_t group, int64_t gy, uint8_t* out) const;

  std::vector<VideoView> videos_;
  PatchLayout layout_;
  Normalization normalization_;
  const RowKernels& kernels_;
  bool stream_ = false;
  std::map<std::pair<int64_t, int64_t>, std::unique_ptr<ResizeAxis>> horizontal_tables_, vertical_tables_;
  std::vector<const ResizeAxis*> horizontal_, vertical_;  // of each video; null where that pass is left out
  std::vector<int64_t> first_unit_, first_row_;           // of each video, then the totals
};

}  // namespace bridge_stg
