// patchify_frames, patchify_frames_out and patchify_videos on CUDA.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "patchify_frames/patchify_frames.cuh"
#include "patchify_frames/patchify_frames_ops.h"
#include "patchify_frames/tile_plan.h"

namespace bridge_stg {
namespace {

template <typename Value, int kPatch>
void launch(const TileJob& job, int64_t blocks, int64_t bytes, void* out, cudaStream_t stream) {
  if (bytes > (48 << 10)) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(patchify_kernel<Value, kPatch>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(bytes)));
  }
  patchify_kernel<Value, kPatch>
      <<<static_cast<unsigned>(blocks), tile_threads(kPatch), bytes, stream>>>(job, static_cast<Value*>(out));
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

// The types of CUDA for the element types.
float cuda_value(float);
__nv_bfloat16 cuda_value(BFloat16);
__half cuda_value(Float16);

class CudaPatcher {
 public:
  CudaPatcher(const std::vector<VideoView>& videos, const PatchLayout& layout, Interpolation interpolation,
              const Normalization& table)
      : layout_(layout), bicubic_(interpolation == Interpolation::kBicubic) {
    normalization_.reciprocal_is_exact = table.reciprocal_is_exact;
    for (int c = 0; c < 3; ++c) {
      normalization_.mean[c] = table.channel[c].mean;
      normalization_.std[c] = table.channel[c].std;
      normalization_.reciprocal[c] = table.channel[c].reciprocal;
    }
    for (const VideoView& video : videos) {
      TileVideo tiles = tile_video(video);
      STD_TORCH_CHECK(plan_tile(tiles, layout_, bicubic_), "patchify_frames: a resize from ", video.height, " x ",
                      video.width, " to ", video.out_height, " x ", video.out_width,
                      " needs more shared memory than the CUDA kernel may take.");
      tiles.first_row = rows_;
      rows_ += ceil_div(video.count, layout_.temporal) * (video.out_height / layout_.patch) *
               (video.out_width / layout_.patch);
      videos_.push_back(tiles);
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
      with_element(element_type(out.scalar_type()), [&](auto element) {
        launch<decltype(cuda_value(element))>(job, blocks, bytes, memory, cuda_stream);
      });
    }
  }

 private:
  PatchLayout layout_;
  bool bicubic_;
  TileNormalization normalization_{};
  std::vector<TileVideo> videos_;
  int64_t rows_ = 0;
};

}  // namespace
}  // namespace bridge_stg

STABLE_TORCH_LIBRARY_IMPL(bridge_stg_native, CUDA, m) {
  using Ops = bridge_stg::PatchifyOps<bridge_stg::CudaPatcher>;
  m.impl("patchify_frames", TORCH_BOX(&Ops::patchify_frames));
  m.impl("patchify_frames_out", TORCH_BOX(&Ops::patchify_frames_out));
  m.impl("patchify_videos", TORCH_BOX(&Ops::patchify_videos));
}
