// The native ops, under the names and arguments of the registered ops less their `backend`. The CUDA library
// implements some of them; it is loaded after this one.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(bridge_stg_native, m) {
  m.def(
      "patchify_frames(Tensor video, Tensor? frame_index, SymInt[2] size, int patch_size, int temporal_patch_size, "
      "int merge_size, float[3] mean, float[3] std, float rescale_factor, str interpolation, str layout, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "patchify_frames_out(Tensor video, Tensor? frame_index, SymInt[2] size, int patch_size, int temporal_patch_size, "
      "int merge_size, float[3] mean, float[3] std, float rescale_factor, str interpolation, str layout, "
      "Tensor(a!) out) -> ()");
  m.def(
      "patchify_videos(Tensor[] videos, Tensor?[] frame_index, SymInt[] sizes, int patch_size, "
      "int temporal_patch_size, int merge_size, float[3] mean, float[3] std, float rescale_factor, str interpolation, "
      "str layout, ScalarType dtype) -> Tensor");
}
