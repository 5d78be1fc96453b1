// What the CPU and the CUDA op make of their arguments. Python has checked them; here only what memory safety needs.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

#include "patchify_frames/normalization.h"
#include "patchify_frames/resize_tables.h"

namespace bridge_stg {

struct FrameAxes {
  int64_t channel, height, width;
};

inline FrameAxes frame_axes(const std::string& layout) {
  return layout == "THWC" ? FrameAxes{3, 1, 2} : FrameAxes{1, 2, 3};
}

inline Interpolation interpolation_of(const std::string& name) {
  return name == "bilinear" ? Interpolation::kBilinear : Interpolation::kBicubic;
}

inline PixelType pixel_type(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return PixelType::kFloat32;
    case ScalarType::BFloat16:
      return PixelType::kBFloat16;
    case ScalarType::Half:
      return PixelType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "patchify_frames: dtype must be torch.float32, torch.bfloat16 or torch.float16.");
  }
}

inline void check_out(const torch::stable::Tensor& out, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == rows && out.size(1) == columns && out.is_contiguous(),
                  "patchify_frames: out must be contiguous with shape [", rows, ", ", columns, "].");
}

}  // namespace bridge_stg
