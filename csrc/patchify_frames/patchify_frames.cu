// patchify_frames, patchify_frames_out and patchify_videos on CUDA.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "patchify_frames/arguments.h"
#include "patchify_frames/patchify_frames.cuh"
#include "patchify_frames/tile_plan.h"

namespace bridge_stg {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename Value, int kPatch>
void launch(const TileJob& job, int64_t blocks, int64_t bytes, void* out, cudaStream_t stream) {
  if (bytes > (48 << 10)) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(patchify_kernel<Value, kPatch>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(bytes)));
  }
  patchify_kernel<Value, kPatch><<<static_cast<unsigned>(blocks), tile_threads(kPatch), bytes, stream>>>(
      job, static_cast<Value*>(out));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Value>
void launch(const TileJob& job, int64_t blocks, int64_t bytes, void* out, cudaStream_t stream) {
  switch (job.layout.patch) {
    case 14:
      return launch<Value, 14>(job, blocks, bytes, out, stream);
    case 16:
      return launch<Value, 16>(job, blocks, bytes, out, stream);
    default:
      return launch<Value, 0>(job, blocks, bytes, out, stream);
  }
}

TileVideo view_of(const Tensor& video, const std::optional<Tensor>& frame_index, int64_t height, int64_t width,
                  const std::string& layout) {
  const FrameAxes axes = frame_axes(layout);
  TileVideo view{};
  view.pixels = static_cast<const uint8_t*>(video.const_data_ptr());
  view.frames = video.size(0);
  view.height = static_cast<int32_t>(video.size(axes.height));
  view.width = static_cast<int32_t>(video.size(axes.width));
  view.frame_stride = video.stride(0);
  view.channel_stride = video.stride(axes.channel);
  view.row_stride = video.stride(axes.height);
  view.pixel_stride = video.stride(axes.width);
  view.count = view.frames;
  view.out_height = static_cast<int32_t>(height);
  view.out_width = static_cast<int32_t>(width);
  if (frame_index.has_value()) {
    view.frame_index = static_cast<const int64_t*>(frame_index->const_data_ptr());
    view.index_stride = frame_index->stride(0);
    view.count = frame_index->size(0);
  }
  return view;
}

class Patcher {
 public:
  Patcher(const std::vector<Tensor>& videos, const std::vector<std::optional<Tensor>>& frame_index,
          const std::vector<int64_t>& sizes, const PatchLayout& layout, const std::vector<double>& mean,
          const std::vector<double>& std, double rescale_factor, const std::string& interpolation,
          const std::string& frame_layout)
      : layout_(layout), bicubic_(interpolation_of(interpolation) == Interpolation::kBicubic) {
    const Normalization table = make_normalization(mean.data(), std.data(), rescale_factor, PixelType::kFloat32);
    normalization_.reciprocal_is_exact = table.reciprocal_is_exact;
    for (int c = 0; c < 3; ++c) {
      normalization_.mean[c] = table.channel[c].mean;
      normalization_.std[c] = table.channel[c].std;
      normalization_.reciprocal[c] = table.channel[c].reciprocal;
    }
    for (size_t i = 0; i < videos.size(); ++i) {
      TileVideo view = view_of(videos[i], frame_index[i], sizes[2 * i], sizes[2 * i + 1], frame_layout);
      STD_TORCH_CHECK(plan_tile(view, layout_, bicubic_), "patchify_frames: a resize from ", view.height, " x ",
                      view.width, " to ", view.out_height, " x ", view.out_width,
                      " needs more shared memory than the CUDA kernel may take.");
      view.first_row = rows_;
      rows_ += (view.count + layout_.temporal - 1) / layout_.temporal * (view.out_height / layout_.patch) *
               (view.out_width / layout_.patch);
      videos_.push_back(view);
    }
  }

  int64_t rows() const { return rows_; }
  int64_t columns() const { return layout_.columns(); }

  void fill(const Tensor& out) const {
    const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(out.get_device_index(), &stream));
    for (size_t first = 0; first < videos_.size(); first += kVideosAtOnce) {
      TileJob job{};
      job.layout = layout_;
      job.normalization = normalization_;
      job.bicubic = bicubic_;
      job.count = static_cast<int>(std::min<size_t>(kVideosAtOnce, videos_.size() - first));
      int64_t blocks = 0, bytes = 0;
      for (int i = 0; i < job.count; ++i) {
        job.videos[i] = videos_[first + i];
        job.videos[i].first_block = blocks;
        blocks += tile_count(job.videos[i], layout_);
        bytes = std::max(bytes, tile_bytes(job.videos[i], layout_));
      }
      STD_TORCH_CHECK(blocks <= INT32_MAX, "patchify_frames: ", blocks, " tiles are more than one launch can have.");
      void* memory = out.mutable_data_ptr();
      const auto cuda_stream = static_cast<cudaStream_t>(stream);
      switch (pixel_type(out.scalar_type())) {
        case PixelType::kFloat32:
          launch<float>(job, blocks, bytes, memory, cuda_stream);
          break;
        case PixelType::kBFloat16:
          launch<__nv_bfloat16>(job, blocks, bytes, memory, cuda_stream);
          break;
        case PixelType::kFloat16:
          launch<__half>(job, blocks, bytes, memory, cuda_stream);
          break;
      }
    }
  }

 private:
  PatchLayout layout_;
  bool bicubic_;
  TileNormalization normalization_{};
  std::vector<TileVideo> videos_;
  int64_t rows_ = 0;
};

Tensor patchify_videos(std::vector<Tensor> videos, std::vector<std::optional<Tensor>> frame_index,
                       std::vector<int64_t> sizes, int64_t patch_size, int64_t temporal_patch_size, int64_t merge_size,
                       std::vector<double> mean, std::vector<double> std, double rescale_factor,
                       std::string interpolation, std::string layout, ScalarType dtype) {
  const Patcher patcher(videos, frame_index, sizes, {patch_size, temporal_patch_size, merge_size}, mean, std,
                        rescale_factor, interpolation, layout);
  const Tensor out = torch::stable::new_empty(videos[0], {patcher.rows(), patcher.columns()}, dtype);
  patcher.fill(out);
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
  const Patcher patcher({video}, {frame_index}, size, {patch_size, temporal_patch_size, merge_size}, mean, std,
                        rescale_factor, interpolation, layout);
  check_out(out, patcher.rows(), patcher.columns());
  patcher.fill(out);
}

}  // namespace
}  // namespace bridge_stg

STABLE_TORCH_LIBRARY_IMPL(bridge_stg_native, CUDA, m) {
  m.impl("patchify_frames", TORCH_BOX(&bridge_stg::patchify_frames));
  m.impl("patchify_frames_out", TORCH_BOX(&bridge_stg::patchify_frames_out));
  m.impl("patchify_videos", TORCH_BOX(&bridge_stg::patchify_videos));
}
