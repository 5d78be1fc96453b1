// patchify_frames on the CPU, free of torch. It takes one row of patches at a time from source pixels to output values.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "patchify_frames/kernels.h"
#include "patchify_frames/normalization.h"
#include "patchify_frames/patch_layout.h"
#include "patchify_frames/video_view.h"

namespace bridge_stg {

// One axis of a resize; only the horizontal axis has a plan.
struct ResizeAxis {
  ResizeTable table;
  HorizontalPlan plan;
};

// Patchifies a list of videos of any sizes into consecutive output rows. A unit of work is one row of patches of one
// temporal group; units may run in any order and on any thread. Besides the tables, each thread needs memory for the
// source and output rows of one unit.
class FramePatcher {
 public:
  FramePatcher(std::vector<VideoView> videos, PatchLayout layout, Interpolation interpolation,
               Normalization normalization, SimdLevel level);

  int64_t units() const { return first_unit_.back(); }
  int64_t rows() const { return first_row_.back(); }
  int64_t columns() const { return layout_.columns(); }

  // Writes the output rows of units first..last-1. `out` is the whole output, [rows(), columns()] of the type of the
  // normalization. Successive units of a temporal group share source rows, which are resized once.
  void run(int64_t first, int64_t last, void* out) const;

 private:
  struct WorkerScratch;

  const ResizeAxis* axis(int64_t in, int64_t out, Interpolation interpolation, bool horizontal);
  void run_video(size_t video, int64_t first, int64_t last, uint8_t* out) const;
  void stage_row(const VideoView& view, int64_t frame, int64_t y, uint8_t* const planes[3]) const;
  void load_rows(size_t video, WorkerScratch& scratch, int64_t first, int64_t last) const;
  void finish_rows(size_t video, WorkerScratch& scratch, int64_t gy) const;
  void write_patches(size_t video, WorkerScratch& scratch, int64_t group, int64_t gy, uint8_t* out) const;

  std::vector<VideoView> videos_;
  PatchLayout layout_;
  Normalization normalization_;
  const PatchifyKernels& kernels_;
  bool stream_ = false;
  std::map<std::pair<int64_t, int64_t>, std::unique_ptr<ResizeAxis>> horizontal_tables_, vertical_tables_;
  std::vector<const ResizeAxis*> horizontal_, vertical_;  // of each video; null for an axis that keeps its size
  std::vector<int64_t> first_unit_, first_row_;           // of each video, then the totals
};

}  // namespace bridge_stg
