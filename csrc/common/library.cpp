// The schemas of the compiled ops: names and arguments of the registered ops, without their `backend`. The CUDA library
// implements some of them too, and is loaded after this one.
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
  m.def(
      "prune_tokens(Tensor tokens, Tensor queries, SymInt keep, str scoring, str reduce, float scale, Tensor? mask, "
      "bool return_scores) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "prune_tokens_backward(Tensor? grad_kept, Tensor? grad_score, Tensor? grad_scores, Tensor? tokens, Tensor kept, "
      "Tensor index, Tensor score, Tensor scores, Tensor queries, SymInt token_count, str scoring, str reduce, "
      "float scale, bool masked, bool need_tokens, bool need_queries) -> (Tensor, Tensor)");
  m.def(
      "attend_memory(Tensor query, Tensor memory, Tensor? position, Tensor? bias, Tensor? key_mask, Tensor? index, "
      "Tensor? window, float scale, bool return_mass, bool stash) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attend_memory_backward(Tensor? grad_out, Tensor? grad_lse, Tensor query, Tensor memory, Tensor? position, "
      "Tensor? bias, Tensor? key_mask, Tensor? index, Tensor? window, Tensor lse, Tensor probability, float scale, "
      "bool need_query, bool need_memory, bool need_position, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attend_memory_layer_backward(Tensor? grad_out, Tensor? grad_lse, Tensor query, Tensor memory, Tensor? position, "
      "Tensor? bias, Tensor? key_mask, Tensor lse, Tensor probability, float scale, bool need_query, bool need_bias) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "attend_memory_shared_backward(Tensor memory, Tensor[] probability, Tensor[] score, Tensor[] query, "
      "Tensor[] grad_out, bool need_position) -> (Tensor, Tensor)");
  m.def(
      "attend_heads(Tensor query, Tensor key_weight, Tensor value_weight, Tensor memory, Tensor? position, "
      "Tensor? bias, Tensor? key_mask, int heads, float scale) -> (Tensor, Tensor)");
  m.def("expand_heads(Tensor narrow, Tensor weight, int heads) -> Tensor");
  m.def("contract_heads(Tensor wide, Tensor weight) -> Tensor");
  m.def("correlate_heads(Tensor narrow, Tensor wide) -> Tensor");
}
