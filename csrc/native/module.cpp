// bridge_stg._native: facts about the build and the host-side resize tables. No tensor crosses this module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu_features.h"

namespace py = pybind11;

#ifndef BRIDGE_STG_CUDA_COMPILER
#define BRIDGE_STG_CUDA_COMPILER ""
#define BRIDGE_STG_CUDA_ARCHITECTURES ""
#endif

PYBIND11_MODULE(_native, m) {
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = BRIDGE_STG_COMPILER;
    info["build_type"] = BRIDGE_STG_BUILD_TYPE;
    info["sanitized"] = static_cast<bool>(BRIDGE_STG_SANITIZED);
    info["torch"] = BRIDGE_STG_TORCH;
    info["cuda_compiler"] = BRIDGE_STG_CUDA_COMPILER;
    info["cuda_architectures"] = BRIDGE_STG_CUDA_ARCHITECTURES;
    info["simd"] = bridge_stg::simd_name(bridge_stg::simd_level());
    return info;
  }, "What this installation was compiled with, and the SIMD level in use here.");
}
