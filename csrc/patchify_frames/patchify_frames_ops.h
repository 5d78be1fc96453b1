// The ops of patchify_frames over the patcher of one device. Python has checked the arguments; here is only what memory
// safety needs.
#pragma once

#include "common/tensor_views.h"
#include "patchify_frames/normalization.h"
#include "patchify_frames/patch_layout.h"
#include "patchify_frames/resize_tables.h"
#include "patchify_frames/video_view.h"

namespace bridge_stg {

// The settings that all videos of a call share.
struct PatchifySettings {
  PatchLayout patches;
  std::vector<double> mean, std;
  double rescale_factor;
  std::string interpolation, layout;
};

inline VideoView view_of(const Tensor& video, const MaybeTensor& frame_index, const std::string& layout,
                         int64_t out_height, int64_t out_width) {
  const bool channels_last = layout == "THWC";
  const int64_t channel = channels_last ? 3 : 1, height = channels_last ? 1 : 2, width = height + 1;
  VideoView view;
  view.pixels = data_of<uint8_t>(video);
  view.frames = video.size(0);
  view.height = video.size(height);
  view.width = video.size(width);
  view.frame_stride = video.stride(0);
  view.channel_stride = video.stride(channel);
  view.row_stride = video.stride(height);
  view.pixel_stride = video.stride(width);
  view.frame_index = data_of<int64_t>(frame_index);
  view.index_stride = frame_index.has_value() ? frame_index->stride(0) : 1;
  view.count = frame_index.has_value() ? frame_index->size(0) : view.frames;
  view.out_height = out_height;
  view.out_width = out_width;
  return view;
}

// The registered ops, whose flat arguments become PatchifySettings here. A Patcher is constructed from (videos, layout,
// interpolation, normalization) and has rows(), columns(), and fill(out), which writes the output.
template <typename Patcher>
struct PatchifyOps {
  static Patcher patcher(const std::vector<Tensor>& videos, const std::vector<MaybeTensor>& frame_index,
                         const std::vector<int64_t>& sizes, const PatchifySettings& settings, ScalarType dtype) {
    std::vector<VideoView> views;
    for (size_t i = 0; i < videos.size(); ++i) {
      views.push_back(view_of(videos[i], frame_index[i], settings.layout, sizes[2 * i], sizes[2 * i + 1]));
    }
    return Patcher(
        std::move(views), settings.patches,
        settings.interpolation == "bilinear" ? Interpolation::kBilinear : Interpolation::kBicubic,
        make_normalization(settings.mean.data(), settings.std.data(), settings.rescale_factor, element_type(dtype)));
  }

  static Tensor patchify_videos(std::vector<Tensor> videos, std::vector<MaybeTensor> frame_index,
                                std::vector<int64_t> sizes, int64_t patch_size, int64_t temporal_patch_size,
                                int64_t merge_size, std::vector<double> mean, std::vector<double> std,
                                double rescale_factor, std::string interpolation, std::string layout,
                                ScalarType dtype) {
    const Patcher made = patcher(
        videos, frame_index, sizes,
        {{patch_size, temporal_patch_size, merge_size}, mean, std, rescale_factor, interpolation, layout}, dtype);
    const Tensor out = new_tensor(videos[0], {made.rows(), made.columns()}, dtype);
    made.fill(out);
    return out;
  }

  static Tensor patchify_frames(Tensor video, MaybeTensor frame_index, std::vector<int64_t> size, int64_t patch_size,
                                int64_t temporal_patch_size, int64_t merge_size, std::vector<double> mean,
                                std::vector<double> std, double rescale_factor, std::string interpolation,
                                std::string layout, ScalarType dtype) {
    return patchify_videos({video}, {frame_index}, size, patch_size, temporal_patch_size, merge_size, mean, std,
                           rescale_factor, interpolation, layout, dtype);
  }

  static void patchify_frames_out(Tensor video, MaybeTensor frame_index, std::vector<int64_t> size, int64_t patch_size,
                                  int64_t temporal_patch_size, int64_t merge_size, std::vector<double> mean,
                                  std::vector<double> std, double rescale_factor, std::string interpolation,
                                  std::string layout, Tensor out) {
    const Patcher made =
        patcher({video}, {frame_index}, size,
                {{patch_size, temporal_patch_size, merge_size}, mean, std, rescale_factor, interpolation, layout},
                out.scalar_type());
    STD_TORCH_CHECK(
        out.dim() == 2 && out.size(0) == made.rows() && out.size(1) == made.columns() && out.is_contiguous(),
        "patchify_frames: out must be contiguous with shape [", made.rows(), ", ", made.columns(), "].");
    made.fill(out);
  }
};

}  // namespace bridge_stg
