// bridge_stg._native: facts about the build and the host-side resize tables. No tensor crosses this module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cpu_features.h"
#include "patchify_frames/resize_tables.h"

namespace py = pybind11;

#ifndef BRIDGE_STG_CUDA_COMPILER
#define BRIDGE_STG_CUDA_COMPILER ""
#define BRIDGE_STG_CUDA_ARCHITECTURES ""
#endif

namespace {

py::dict resize_table(int64_t in, int64_t out, const std::string& interpolation) {
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
  if (in < 1 || in > kLargest || out < 1 || out > kLargest) {
    throw std::invalid_argument("resize_table: sizes must be in 1..2147483647, got " + std::to_string(in) + " and " +
                                std::to_string(out) + ".");
  }
  if (interpolation != "bilinear" && interpolation != "bicubic") {
    throw std::invalid_argument("resize_table: interpolation must be 'bilinear' or 'bicubic', got '" + interpolation +
                                "'.");
  }
  const auto table = bridge_stg::make_resize_table(
      in, out, interpolation == "bicubic" ? bridge_stg::Interpolation::kBicubic : bridge_stg::Interpolation::kBilinear);
  std::vector<std::vector<int>> weights;
  for (int64_t i = 0; i < out; ++i) {
    const auto row = table.weights.begin() + i * table.taps;
    weights.emplace_back(row, row + table.count[i]);
  }
  py::dict result;
  result["start"] = table.start;
  result["weights"] = weights;
  result["precision"] = table.precision;
  return result;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = BRIDGE_STG_COMPILER;
        info["build_type"] = BRIDGE_STG_BUILD_TYPE;
        info["sanitized"] = static_cast<bool>(BRIDGE_STG_SANITIZED);
        info["torch"] = BRIDGE_STG_TORCH;
        info["cuda_compiler"] = BRIDGE_STG_CUDA_COMPILER;
        info["cuda_architectures"] = BRIDGE_STG_CUDA_ARCHITECTURES;
        info["simd"] = bridge_stg::simd_name(bridge_stg::simd_level());
        return info;
      },
      "What this installation was compiled with, and the SIMD level in use here.");
  m.def("resize_table", &resize_table, py::arg("in_size"), py::arg("out_size"), py::arg("interpolation"),
        "Table of the antialiased resize of one axis, as patchify_frames uses it on the CPU: for each output pixel the "
        "first input pixel (start) and the int16 weights from there on, with `precision` fractional bits.");
}
