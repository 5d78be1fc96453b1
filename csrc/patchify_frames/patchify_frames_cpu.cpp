#include "patchify_frames/patchify_frames_cpu.h"

#include <algorithm>
#include <cstring>

namespace bridge_stg {
namespace {

constexpr int64_t kRowsAtOnce = 4;  // source rows of a plane that the horizontal pass takes together
// Outputs larger than this are written past the cache, because they would only push everything else out of it.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

// The bytes from one scratch row to the next: an odd number of cache lines, so that rows use different cache sets.
int64_t row_pitch(int64_t width) {
  const int64_t lines = ceil_div(width + kRowSlack, kCacheLine);
  return (lines | 1) * kCacheLine;
}

// Copies pixels, and up to 15 bytes more.
void copy_pixels(const uint8_t* in, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; i += 16) std::memcpy(out + i, in + i, 16);
}

}  // namespace

// What one thread needs to patchify rows of patches of one video.
struct FramePatcher::WorkerScratch {
  WorkerScratch(const VideoView& view, const PatchLayout& layout, int64_t source_rows, const ResizeTable* horizontal,
                const ResizeTable* vertical)
      : capacity(source_rows),
        pitch(row_pitch(view.out_width)),
        staging_pitch(row_pitch(view.width + (horizontal ? horizontal->taps : 0))),
        ring(3 * layout.temporal * capacity * pitch),
        staging(horizontal ? 3 * layout.temporal * kRowsAtOnce * staging_pitch : 0),
        band(vertical ? 3 * layout.temporal * layout.patch * pitch : 0),
        patch(layout.columns() + kRowSlack),
        finished(3 * layout.temporal * layout.patch),
        taps(vertical ? vertical->taps : 0),
        frame(layout.temporal),
        same_as(layout.temporal) {}

  uint8_t* ring_row(int64_t plane, int64_t y) const { return ring.data() + (plane * capacity + y % capacity) * pitch; }

  int64_t capacity;              // source rows a plane that `ring` holds
  int64_t pitch, staging_pitch;  // bytes from row to row
  AlignedBytes ring;             // [temporal * 3, capacity] rows after the horizontal pass, by source row % capacity
  AlignedBytes staging;          // [temporal * 3, kRowsAtOnce] rows before it
  AlignedBytes band;             // [temporal * 3, patch] rows after the vertical pass
  AlignedBytes patch;            // [columns] pixels of one output row
  std::vector<const uint8_t*> finished;  // [temporal * 3, patch] rows of `band`, or of `ring` without a vertical pass
  std::vector<const uint8_t*> taps;      // rows that weigh into one output row
  std::vector<const uint8_t*> in;        // arguments of the horizontal pass
  std::vector<uint8_t*> out;
  std::vector<int64_t> frame;    // [temporal] source frames of the group
  std::vector<int64_t> same_as;  // [temporal] first position of the group with the same source frame
};

FramePatcher::FramePatcher(std::vector<VideoView> videos, PatchLayout layout, Interpolation interpolation,
                           Normalization normalization, SimdLevel level)
    : videos_(std::move(videos)),
      layout_(layout),
      normalization_(normalization),
      kernels_(kernels_of<PatchifyKernels>(level)) {
  first_unit_.push_back(0);
  first_row_.push_back(0);
  for (const VideoView& view : videos_) {
    horizontal_.push_back(axis(view.width, view.out_width, interpolation, true));
    vertical_.push_back(axis(view.height, view.out_height, interpolation, false));
    const int64_t groups = ceil_div(view.count, layout_.temporal);
    const int64_t gh = view.out_height / layout_.patch, gw = view.out_width / layout_.patch;
    first_unit_.push_back(first_unit_.back() + groups * gh);
    first_row_.push_back(first_row_.back() + groups * gh * gw);
  }
  stream_ = rows() * columns() * element_size(normalization_.type) >= kStreamBytes;
}

const ResizeAxis* FramePatcher::axis(int64_t in, int64_t out, Interpolation interpolation, bool horizontal) {
  if (in == out) return nullptr;
  std::unique_ptr<ResizeAxis>& entry = (horizontal ? horizontal_tables_ : vertical_tables_)[{in, out}];
  if (entry == nullptr) {
    entry = std::make_unique<ResizeAxis>();
    entry->table = make_resize_table(in, out, interpolation);
    if (horizontal) entry->plan = make_plan(entry->table, kernels_.shape);
  }
  return entry.get();
}

void FramePatcher::run(int64_t first, int64_t last, void* out) const {
  for (size_t video = 0; video < videos_.size(); ++video) {
    const int64_t begin = std::max(first, first_unit_[video]), end = std::min(last, first_unit_[video + 1]);
    if (begin < end) {
      run_video(video, begin - first_unit_[video], end - first_unit_[video], static_cast<uint8_t*>(out));
    }
  }
}

void FramePatcher::run_video(size_t video, int64_t first, int64_t last, uint8_t* out) const {
  const VideoView& view = videos_[video];
  const int64_t P = layout_.patch, gh = view.out_height / P;
  const ResizeTable* horizontal = horizontal_[video] == nullptr ? nullptr : &horizontal_[video]->table;
  const ResizeTable* vertical = vertical_[video] == nullptr ? nullptr : &vertical_[video]->table;
  // The source rows low..high-1 that the row gy of patches needs.
  const auto needed = [&](int64_t gy) {
    const int64_t top = gy * P, bottom = top + P - 1;
    if (vertical == nullptr) return std::pair<int64_t, int64_t>(top, bottom + 1);
    return std::pair<int64_t, int64_t>(vertical->start[top], vertical->start[bottom] + vertical->count[bottom]);
  };
  int64_t source_rows = 1;
  for (int64_t gy = 0; gy < gh; ++gy) source_rows = std::max(source_rows, needed(gy).second - needed(gy).first);
  WorkerScratch scratch(view, layout_, source_rows, horizontal, vertical);
  int64_t loaded_group = -1, loaded = 0;  // rows before `loaded` of this group are in the ring
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t group = unit / gh, gy = unit % gh;
    const auto [low, high] = needed(gy);
    if (group != loaded_group) {
      loaded_group = group;
      loaded = low;
      for (int64_t dt = 0; dt < layout_.temporal; ++dt) {
        const int64_t position = layout_.frame(group, dt, view.count);
        scratch.frame[dt] = view.frame_index ? view.frame_index[position * view.index_stride] : position;
        scratch.same_as[dt] =
            std::find(scratch.frame.begin(), scratch.frame.begin() + dt, scratch.frame[dt]) - scratch.frame.begin();
      }
    }
    load_rows(video, scratch, std::max(loaded, low), high);
    loaded = std::max(loaded, high);
    finish_rows(video, scratch, gy);
    write_patches(video, scratch, group, gy, out);
  }
}

// Takes source rows first..last-1 of the group's frames through the horizontal pass into the ring.
void FramePatcher::load_rows(size_t video, WorkerScratch& scratch, int64_t first, int64_t last) const {
  const VideoView& view = videos_[video];
  for (int64_t y = first; y < last; y += kRowsAtOnce) {
    scratch.in.clear();
    scratch.out.clear();
    for (int64_t dt = 0; dt < layout_.temporal; ++dt) {
      if (scratch.same_as[dt] != dt) continue;
      for (int64_t row = y; row < std::min(last, y + kRowsAtOnce); ++row) {
        uint8_t* planes[3];
        for (int64_t c = 0; c < 3; ++c) {
          const int64_t plane = 3 * dt + c;
          planes[c] = scratch.ring_row(plane, row);
          if (horizontal_[video]) {
            scratch.out.push_back(planes[c]);
            planes[c] = scratch.staging.data() + (plane * kRowsAtOnce + row - y) * scratch.staging_pitch;
            scratch.in.push_back(planes[c]);
          }
        }
        stage_row(view, scratch.frame[dt], row, planes);
      }
    }
    if (horizontal_[video]) {
      kernels_.horizontal(horizontal_[video]->table, horizontal_[video]->plan, scratch.in.data(), scratch.out.data(),
                          static_cast<int64_t>(scratch.in.size()));
    }
  }
}

// Copies one source row into three planes.
void FramePatcher::stage_row(const VideoView& view, int64_t frame, int64_t y, uint8_t* const planes[3]) const {
  const uint8_t* row = view.pixels + frame * view.frame_stride + y * view.row_stride;
  if (view.pixel_stride == 3 && view.channel_stride == 1) {
    kernels_.split(row, view.width, planes);
    return;
  }
  for (int64_t c = 0; c < 3; ++c) {
    const uint8_t* pixels = row + c * view.channel_stride;
    if (view.pixel_stride == 1) {
      std::memcpy(planes[c], pixels, view.width);
    } else {
      for (int64_t x = 0; x < view.width; ++x) planes[c][x] = pixels[x * view.pixel_stride];
    }
  }
}

// Takes the rows of the row gy of patches through the vertical pass.
void FramePatcher::finish_rows(size_t video, WorkerScratch& scratch, int64_t gy) const {
  const int64_t P = layout_.patch;
  for (int64_t plane = 0; plane < 3 * layout_.temporal; ++plane) {
    const int64_t original = 3 * scratch.same_as[plane / 3] + plane % 3;
    if (original != plane) {
      std::copy_n(scratch.finished.begin() + original * P, P, scratch.finished.begin() + plane * P);
      continue;
    }
    for (int64_t py = 0; py < P; ++py) {
      const int64_t y = gy * P + py;
      const uint8_t*& finished = scratch.finished[plane * P + py];
      if (vertical_[video] == nullptr) {
        finished = scratch.ring_row(plane, y);
        continue;
      }
      const ResizeTable& table = vertical_[video]->table;
      for (int32_t j = 0; j < table.count[y]; ++j) scratch.taps[j] = scratch.ring_row(plane, table.start[y] + j);
      uint8_t* row = scratch.band.data() + (plane * P + py) * scratch.pitch;
      kernels_.vertical(table.weights.data() + y * table.taps, table.count[y], table.precision, scratch.taps.data(),
                        videos_[video].out_width, row);
      finished = row;
    }
  }
}

void FramePatcher::write_patches(size_t video, WorkerScratch& scratch, int64_t group, int64_t gy, uint8_t* out) const {
  const VideoView& view = videos_[video];
  const int64_t P = layout_.patch, gh = view.out_height / P, gw = view.out_width / P;
  const int64_t size = element_size(normalization_.type), pixels = layout_.temporal * P * P;
  uint8_t* patch = scratch.patch.data();
  for (int64_t gx = 0; gx < gw; ++gx) {
    uint8_t* next = patch;
    for (int64_t c = 0; c < 3; ++c) {
      for (int64_t dt = 0; dt < layout_.temporal; ++dt) {
        const uint8_t* const* rows = scratch.finished.data() + (3 * dt + c) * P;
        for (int64_t py = 0; py < P; ++py, next += P) copy_pixels(rows[py] + gx * P, P, next);
      }
    }
    const int64_t row = first_row_[video] + layout_.row(group, gy, gx, gh, gw);
    for (int64_t c = 0; c < 3; ++c) {
      kernels_.normalize(normalization_, static_cast<int>(c), patch + c * pixels, pixels,
                         out + (row * layout_.columns() + c * pixels) * size, stream_);
    }
  }
}

}  // namespace bridge_stg
