// The products of heads as ops. All tensors are float32 and contiguous.
#include "attend_memory/head_products.h"
#include "common/tensor_views.h"

namespace bridge_stg {
namespace {

HeadShape shape_of(int64_t count, const Tensor& weight, int64_t heads) {
  return {count, heads, weight.size(0) / heads, weight.size(1)};
}

Tensor expand(Tensor narrow, Tensor weight, int64_t heads) {
  const Tensor wide = torch::stable::new_empty(narrow, {narrow.size(0), heads, weight.size(1)});
  expand_heads(shape_of(narrow.size(0), weight, heads), data_of(narrow), data_of(weight), fill_of(wide),
               attend_kernels(simd_level()), run_parallel);
  return wide;
}

Tensor contract(Tensor wide, Tensor weight) {
  const Tensor narrow = torch::stable::new_empty(wide, {wide.size(0), weight.size(0)});
  contract_heads(shape_of(wide.size(0), weight, wide.size(1)), data_of(wide), data_of(weight), fill_of(narrow),
                 attend_kernels(simd_level()), run_parallel);
  return narrow;
}

Tensor correlate(Tensor narrow, Tensor wide) {
  const Tensor weight = torch::stable::new_empty(narrow, {narrow.size(1), wide.size(2)});
  correlate_heads(shape_of(narrow.size(0), weight, wide.size(1)), data_of(narrow), data_of(wide), fill_of(weight),
                  attend_kernels(simd_level()), run_parallel);
  return weight;
}

}  // namespace
}  // namespace bridge_stg

STABLE_TORCH_LIBRARY_IMPL(bridge_stg_native, CPU, m) {
  m.impl("expand_heads", TORCH_BOX(&bridge_stg::expand));
  m.impl("contract_heads", TORCH_BOX(&bridge_stg::contract));
  m.impl("correlate_heads", TORCH_BOX(&bridge_stg::correlate));
}
