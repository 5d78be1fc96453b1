// What the registered ops need of torch: threads, and tensors as pointers and element types.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/elements.h"
#include "common/huge_pages.h"
#include "common/parallel.h"

namespace bridge_stg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The threads of torch's intra-op pool.
inline Workers torch_workers() {
  return {torch::stable::get_num_threads(), [](int64_t units, const std::function<void(int64_t, int64_t)>& task) {
            if (units > 0) torch::stable::parallel_for(0, units, 1, task);
          }};
}

inline ElementType element_type(ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "The compiled kernels take float32, bfloat16 and float16.");
  if (type == ScalarType::Float) return ElementType::kFloat32;
  return type == ScalarType::BFloat16 ? ElementType::kBFloat16 : ElementType::kFloat16;
}

template <typename T = float>
const T* data_of(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T = float>
const T* data_of(const MaybeTensor& x) {
  return x.has_value() ? data_of<T>(*x) : nullptr;
}

template <typename T = float>
T* fill_of(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Tensors of three axes whose elements of a row lie side by side are read where they are.
inline Tensor with_dense_rows(const Tensor& x) { return x.stride(2) == 1 ? x : torch::stable::contiguous(x); }

inline MaybeTensor with_dense_rows(const MaybeTensor& x) {
  return x.has_value() ? MaybeTensor(with_dense_rows(*x)) : std::nullopt;
}

inline MaybeTensor contiguous(const MaybeTensor& x) {
  return x.has_value() ? MaybeTensor(torch::stable::contiguous(*x)) : std::nullopt;
}

inline Tensor new_tensor(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  Tensor made = torch::stable::new_empty(like, shape, type);
  if (made.is_cpu())
    advise_huge_pages(made.mutable_data_ptr(), made.numel() * static_cast<int64_t>(made.element_size()));
  return made;
}

}  // namespace bridge_stg
