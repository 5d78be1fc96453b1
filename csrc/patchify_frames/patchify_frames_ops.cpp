// patchify_frames, patchify_frames_out and patchify_videos on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/huge_pages.h"
#include "patchify_frames/arguments.h"
#include "patchify_frames/patchify_frames_cpu.h"

namespace bridge_stg {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

VideoView view_of(const Tensor& video, const std::optional<Tensor>& frame_index, int64_t height, int64_t width,
                  const std::string& layout) {
  const FrameAxes axes = frame_axes(layout);
  VideoView view;
  view.pixels = static_cast<const uint8_t*>(video.const_data_ptr());
  view.frames = video.size(0);
  view.height = video.size(axes.height);
  view.width = video.size(axes.width);
  view.frame_stride = video.stride(0);
  view.channel_stride = video.stride(axes.channel);
  view.row_stride = video.stride(axes.height);
  view.pixel_stride = video.stride(axes.width);
  view.count = view.frames;
  view.out_height = height;
  view.out_width = width;
  if (frame_index.has_value()) {
    view.frame_index = static_cast<const int64_t*>(frame_index->const_data_ptr());
    view.index_stride = frame_index->stride(0);
    view.count = frame_index->size(0);
    for (int64_t i = 0; i < view.count; ++i) {
      const int64_t frame = view.frame_index[i * view.index_stride];
      STD_TORCH_CHECK(frame >= 0 && frame < view.frames, "patchify_frames: frame_index must be in 0..",
                      view.frames - 1, " (frames of the video), got ", frame, ".");
    }
  }
  return view;
}

FramePatcher patcher_of(const std::vector<Tensor>& videos, const std::vector<std::optional<Tensor>>& frame_index,
                        const std::vector<int64_t>& sizes, const PatchLayout& layout, const std::vector<double>& mean,
                        const std::vector<double>& std, double rescale_factor, const std::string& interpolation,
                        const std::string& frame_layout, ScalarType dtype) {
  std::vector<VideoView> views;
  for (size_t i = 0; i < videos.size(); ++i) {
    views.push_back(view_of(videos[i], frame_index[i], sizes[2 * i], sizes[2 * i + 1], frame_layout));
  }
  return FramePatcher(std::move(views), layout, interpolation_of(interpolation),
                      make_normalization(mean.data(), std.data(), rescale_factor, pixel_type(dtype)), simd_level());
}

void fill(const FramePatcher& patcher, const Tensor& out) {
  void* memory = out.mutable_data_ptr();
  torch::stable::parallel_for(0, patcher.units(), 1,
                              [&](int64_t first, int64_t last) { patcher.run(first, last, memory); });
}

Tensor patchify_videos(std::vector<Tensor> videos, std::vector<std::optional<Tensor>> frame_index,
                       std::vector<int64_t> sizes, int64_t patch_size, int64_t temporal_patch_size, int64_t merge_size,
                       std::vector<double> mean, std::vector<double> std, double rescale_factor,
                       std::string interpolation, std::string layout, ScalarType dtype) {
  const FramePatcher patcher = patcher_of(videos, frame_index, sizes, {patch_size, temporal_patch_size, merge_size},
                                          mean, std, rescale_factor, interpolation, layout, dtype);
  const Tensor out = torch::stable::new_empty(videos[0], {patcher.rows(), patcher.columns()}, dtype);
  advise_huge_pages(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  fill(patcher, out);
  return out;
}

Tensor patchify_frames(Tensor video, std::optional<Tensor> frame_index, std::vector<int64_t> size, int64_t patch_size,
                       int64_t temporal_patch_size, int64_t merge_size, std::vector<double> mean,
                       std::vector<double> std, double rescale_factor, std::string interpolation, std::string layout,
                       ScalarType dtype) {
  return patchify_videos({video}, {frame_index}, size, patch_size, temporal_patch_size, merge_size, mean, std,
                         rescale_factor, interpolation, layout, dtype);
}

void patchify_frames_out(Tensor video, std::optional<Tensor> frame_index, std::vector<int64_t> size,
                         int64_t patch_size, int64_t temporal_patch_size, int64_t merge_size, std::vector<double> mean,
                         std::vector<double> std, double rescale_factor, std::string interpolation, std::string layout,
                         Tensor out) {
  const FramePatcher patcher =
      patcher_of({video}, {frame_index}, size, {patch_size, temporal_patch_size, merge_size}, mean, std, rescale_factor,
                 interpolation, layout, out.scalar_type());
  check_out(out, patcher.rows(), patcher.columns());
  fill(patcher, out);
}

}  // namespace
}  // namespace bridge_stg

STABLE_TORCH_LIBRARY_IMPL(bridge_stg_native, CPU, m) {
  m.impl("patchify_frames", TORCH_BOX(&bridge_stg::patchify_frames));
  m.impl("patchify_frames_out", TORCH_BOX(&bridge_stg::patchify_frames_out));
  m.impl("patchify_videos", TORCH_BOX(&bridge_stg::patchify_videos));
}
