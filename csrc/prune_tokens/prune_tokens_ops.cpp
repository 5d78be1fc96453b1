// prune_tokens and prune_tokens_backward on the CPU.
#include "common/tensor_views.h"
#include "prune_tokens/prune_tokens_cpu.h"

namespace bridge_stg {
namespace {

Scoring scoring_of(const std::string& scoring, const std::string& reduce) {
  STD_TORCH_CHECK(scoring == "dot" || scoring == "cosine", "prune_tokens: unknown scoring '", scoring, "'.");
  STD_TORCH_CHECK(reduce == "max" || reduce == "mean" || reduce == "logsumexp", "prune_tokens: unknown reduce '",
                  reduce, "'.");
  return {scoring == "cosine",
          reduce == "max" ? Reduce::kMax : (reduce == "mean" ? Reduce::kMean : Reduce::kLogSumExp)};
}

TokenRows rows_of(const Tensor& x) {
  return {element_type(x.scalar_type()), x.const_data_ptr(), x.size(0), x.size(1), x.size(2), x.stride(0), x.stride(1)};
}

QueryView view_of(const Tensor& x) {
  return {element_type(x.scalar_type()), x.const_data_ptr(), x.size(1), x.stride(0), x.stride(1), x.stride(2)};
}

// Returns zeros [segments, count, width]. A large tensor takes its memory from the system, which has cleared it.
Tensor new_zeros(const Tensor& like, int64_t segments, int64_t count, int64_t width) {
  const int64_t bytes = segments * count * width * static_cast<int64_t>(like.element_size());
  void* memory = map_zeros(bytes);
  if (memory == nullptr) return torch::stable::new_zeros(like, {segments, count, width});
  const std::vector<int64_t> shape = {segments, count, width}, strides = {count * width, width, 1};
  return torch::stable::from_blob(memory, shape, strides, like.device(), like.scalar_type(),
                                  [bytes](void* start) { unmap_zeros(start, bytes); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prune_tokens(Tensor tokens, Tensor queries, int64_t keep,
                                                        std::string scoring, std::string reduce, double scale,
                                                        MaybeTensor mask, bool return_scores) {
  const Tensor x = with_dense_rows(tokens);
  const MaybeTensor visible = contiguous(mask);
  const int64_t segments = x.size(0), count = x.size(1), width = x.size(2);
  STD_TORCH_CHECK(keep >= 1 && keep <= count, "prune_tokens: keep must be in 1..", count, ", got ", keep, ".");
  const Tensor kept = new_tensor(tokens, {segments, keep, width}, tokens.scalar_type());
  const Tensor index = new_tensor(tokens, {segments, keep}, ScalarType::Long);
  const Tensor score = new_tensor(tokens, {segments, keep}, ScalarType::Float);
  const Tensor scores = new_tensor(
      tokens, return_scores ? std::vector<int64_t>{segments, count} : std::vector<int64_t>{0}, ScalarType::Float);
  prune_forward(
      rows_of(x), view_of(queries),
      {scoring_of(scoring, reduce), static_cast<float>(scale), keep, data_of<bool>(visible), kept.mutable_data_ptr(),
       fill_of<int64_t>(index), fill_of(score), return_scores ? fill_of(scores) : nullptr},
      kernels_of<PruneKernels>(simd_level()), torch_workers());
  return {kept, index, score, scores};
}

std::tuple<Tensor, Tensor> prune_tokens_backward(MaybeTensor grad_kept, MaybeTensor grad_score, MaybeTensor grad_scores,
                                                 MaybeTensor tokens, Tensor kept, Tensor index, Tensor score,
                                                 Tensor scores, Tensor queries, int64_t token_count,
                                                 std::string scoring, std::string reduce, double scale, bool masked,
                                                 bool need_tokens, bool need_queries) {
  const bool all = grad_scores.has_value();
  STD_TORCH_CHECK(!all || tokens.has_value(), "prune_tokens: the gradient of all scores needs all tokens.");
  const Tensor rows = with_dense_rows(all ? *tokens : kept);
  const Tensor row_scores = torch::stable::contiguous(all ? scores : score), picks = torch::stable::contiguous(index);
  const MaybeTensor d_score = contiguous(grad_score), d_scores = contiguous(grad_scores);
  const MaybeTensor d_kept = with_dense_rows(grad_kept);
  const int64_t segments = kept.size(0), keep = kept.size(1), width = kept.size(2);
  const int64_t* pick = data_of<int64_t>(picks);
  for (int64_t j = 0; j < segments * keep; ++j) {
    STD_TORCH_CHECK(pick[j] >= (j % keep == 0 ? 0 : pick[j - 1] + 1) && pick[j] < token_count,
                    "prune_tokens: index must ascend within 0..", token_count - 1, ", got ", pick[j], ".");
  }
  const Tensor d_tokens =
      need_tokens ? new_zeros(kept, segments, token_count, width) : torch::stable::new_empty(kept, {0});
  const Tensor d_queries = need_queries ? torch::stable::new_empty(queries, {segments, queries.size(1), width})
                                        : torch::stable::new_empty(queries, {0});
  PruneBackward call{scoring_of(scoring, reduce),
                     static_cast<float>(scale),
                     masked,
                     token_count,
                     keep,
                     pick,
                     data_of(row_scores),
                     data_of(d_score),
                     data_of(d_scores),
                     {},
                     need_tokens ? d_tokens.mutable_data_ptr() : nullptr,
                     need_queries ? d_queries.mutable_data_ptr() : nullptr};
  if (d_kept.has_value() && need_tokens) call.grad_kept = rows_of(*d_kept);
  prune_backward(rows_of(rows), view_of(queries), call, kernels_of<PruneKernels>(simd_level()), torch_workers());
  return {d_tokens, d_queries};
}

}  // namespace
}  // namespace bridge_stg

STABLE_TORCH_LIBRARY_IMPL(bridge_stg_native, CPU, m) {
  m.impl("prune_tokens", TORCH_BOX(&bridge_stg::prune_tokens));
  m.impl("prune_tokens_backward", TORCH_BOX(&bridge_stg::prune_tokens_backward));
}
