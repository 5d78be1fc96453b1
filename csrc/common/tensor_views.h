// What the ops of this folder need of tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <optional>

namespace bridge_stg {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline void run_parallel(int64_t units, const std::function<void(int64_t, int64_t)>& task) {
  if (units > 0) torch::stable::parallel_for(0, units, 1, task);
}

inline const float* data_of(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }

inline const float* data_of(const MaybeTensor& x) { return x.has_value() ? data_of(*x) : nullptr; }

inline float* fill_of(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

}  // namespace bridge_stg
