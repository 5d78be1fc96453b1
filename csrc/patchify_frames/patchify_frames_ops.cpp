// patchify_frames, patchify_frames_out and patchify_videos on the CPU.
#include "patchify_frames/patchify_frames_ops.h"

#include "patchify_frames/patchify_frames_cpu.h"

namespace bridge_stg {
namespace {

class CpuPatcher {
 public:
  CpuPatcher(std::vector<VideoView> videos, const PatchLayout& layout, Interpolation interpolation,
             const Normalization& normalization)
      : patcher_(checked(std::move(videos)), layout, interpolation, normalization, simd_level()) {}

  int64_t rows() const { return patcher_.rows(); }
  int64_t columns() const { return patcher_.columns(); }

  void fill(const Tensor& out) const {
    void* memory = out.mutable_data_ptr();
    torch_workers().run(patcher_.units(), [&](int64_t first, int64_t last) { patcher_.run(first, last, memory); });
  }

 private:
  static std::vector<VideoView> checked(std::vector<VideoView> videos) {
    for (const VideoView& view : videos) {
      for (int64_t i = 0; view.frame_index != nullptr && i < view.count; ++i) {
        const int64_t frame = view.frame_index[i * view.index_stride];
        STD_TORCH_CHECK(frame >= 0 && frame < view.frames, "patchify_frames: frame_index must be in 0..",
                        view.frames - 1, " (frames of the video), got ", frame, ".");
      }
    }
    return videos;
  }

  FramePatcher patcher_;
};

}  // namespace
}  // namespace bridge_stg

STABLE_TORCH_LIBRARY_IMPL(bridge_stg_native, CPU, m) {
  using Ops = bridge_stg::PatchifyOps<bridge_stg::CpuPatcher>;
  m.impl("patchify_frames", TORCH_BOX(&Ops::patchify_frames));
  m.impl("patchify_frames_out", TORCH_BOX(&Ops::patchify_frames_out));
  m.impl("patchify_videos", TORCH_BOX(&Ops::patchify_videos));
}
