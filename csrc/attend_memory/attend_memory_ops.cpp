// attend_memory on the CPU: the op, its backward, the halves of the backward of a shared memory, the products of heads.
#include "attend_memory/head_products.h"
#include "common/tensor_views.h"

namespace bridge_stg {
namespace {

const AttendKernels& kernels() { return kernels_of<AttendKernels>(simd_level()); }

Tensor as_float(const Tensor& x) {
  return torch::stable::contiguous(x.scalar_type() == ScalarType::Float ? x : torch::stable::to(x, ScalarType::Float));
}

MaybeTensor as_float(const MaybeTensor& x) { return x.has_value() ? MaybeTensor(as_float(*x)) : std::nullopt; }

Tensor as_type(const Tensor& x, ScalarType type) { return x.scalar_type() == type ? x : torch::stable::to(x, type); }

Tensor new_floats(const Tensor& like, std::vector<int64_t> shape) {
  return new_tensor(like, std::move(shape), ScalarType::Float);
}

// The memory of a call, with the tensors that its pointers point into.
struct HeldMemory {
  Tensor value;
  MaybeTensor position, bias, visible;
  Memory memory;

  HeldMemory(const Tensor& given, const MaybeTensor& given_position, const MaybeTensor& given_bias,
             const MaybeTensor& key_mask)
      : value(with_dense_rows(given)),
        position(with_dense_rows(given_position)),
        bias(as_float(given_bias)),
        visible(contiguous(key_mask)) {
    memory.type = element_type(value.scalar_type());
    memory.clips = value.size(0);
    memory.keys = value.size(1);
    memory.width = value.size(2);
    memory.value = rows_of(value);
    if (position.has_value()) memory.position = rows_of(*position);
    memory.bias = data_of(bias);
    memory.visible = data_of<bool>(visible);
  }

 private:
  static KeyRows rows_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }
};

void check_options(const MaybeTensor& index, const MaybeTensor& window) {
  STD_TORCH_CHECK(!index.has_value() && !window.has_value(),
                  "attend_memory: the native backend takes neither index nor window.");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_memory(Tensor query, Tensor memory, MaybeTensor position,
                                                         MaybeTensor bias, MaybeTensor key_mask, MaybeTensor index,
                                                         MaybeTensor window, double scale, bool return_mass,
                                                         bool stash) {
  check_options(index, window);
  const HeldMemory held(memory, position, bias, key_mask);
  const int64_t clips = held.memory.clips, keys = held.memory.keys, rows = query.size(1);
  const Tensor wide = as_float(query);
  const Tensor out = new_floats(query, {clips, rows, held.memory.width}), lse = new_floats(query, {clips, rows});
  const Tensor mass = return_mass ? new_floats(query, {clips, keys}) : new_floats(query, {0});
  const Tensor none = new_floats(query, {0});
  const bool keep = stash || return_mass;
  const Tensor probability = keep ? new_floats(query, {clips, keys, stash_columns(rows)}) : none;
  const Workers workers = torch_workers();
  Attention(held.memory, rows, kernels(), workers)
      .forward({rows, static_cast<float>(scale), data_of(wide), fill_of(out), fill_of(lse),
                return_mass ? fill_of(mass) : nullptr, keep ? fill_of(probability) : nullptr});
  return {as_type(out, query.scalar_type()), lse, mass, stash ? probability : none};
}

// The arguments of a backward call that concern one layer alone.
struct LayerCall {
  const MaybeTensor &grad_out, &grad_lse;
  const Tensor &query, &lse, &probability;
  double scale;
  bool need_query, need_bias;
};

// The gradients of a layer's own inputs, and what the gradient of the memory needs of the layer: `score` is scale times
// the gradient of the scores, `stash` is P (computed again if the forward kept none), `query` and `grad_out` are in
// float32.
struct LayerGradients {
  Tensor d_query, d_bias, score, stash, query;
  MaybeTensor grad_out;
};

LayerGradients layer_gradients(const HeldMemory& held, const LayerCall& call, const MaybeTensor& bias) {
  const Tensor& query = call.query;
  const int64_t clips = held.memory.clips, keys = held.memory.keys, rows = query.size(1);
  const std::vector<int64_t> shape = {clips, keys, stash_columns(rows)};
  const bool stashed = call.probability.dim() == 3;
  const Tensor none = new_floats(query, {0});
  LayerGradients made{call.need_query ? new_floats(query, {clips, rows, held.memory.width}) : none,
                      call.need_bias ? new_floats(query, {clips, keys}) : none,
                      new_floats(query, shape),
                      stashed ? call.probability : new_floats(query, shape),
                      as_float(query),
                      as_float(call.grad_out)};
  const MaybeTensor grad_lse = as_float(call.grad_lse);
  const Workers workers = torch_workers();
  Attention(held.memory, rows, kernels(), workers)
      .backward({rows, static_cast<float>(call.scale), data_of(made.query), data_of(call.lse), fill_of(made.stash),
                 stashed, data_of(made.grad_out), data_of(grad_lse), fill_of(made.score),
                 call.need_query ? fill_of(made.d_query) : nullptr, call.need_bias ? fill_of(made.d_bias) : nullptr});
  made.d_query = as_type(made.d_query, query.scalar_type());
  if (call.need_bias) made.d_bias = as_type(made.d_bias, bias->scalar_type());
  return made;
}

std::tuple<Tensor, Tensor> memory_gradients(const Memory& memory, const Tensor& like,
                                            const std::vector<LayerRows>& layers, bool need_memory,
                                            bool need_position) {
  const Tensor none = torch::stable::new_empty(like, {0});
  const std::vector<int64_t> shape = {memory.clips, memory.keys, memory.width};
  const Tensor d_memory = need_memory ? torch::stable::new_empty(like, shape) : none;
  const Tensor d_position = need_position ? torch::stable::new_empty(like, shape) : none;
  if (need_memory || need_position) {
    memory_gradient(
        memory, layers,
        {need_memory ? d_memory.mutable_data_ptr() : nullptr, need_position ? d_position.mutable_data_ptr() : nullptr},
        kernels(), torch_workers());
  }
  return {d_memory, d_position};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_memory_backward(
    MaybeTensor grad_out, MaybeTensor grad_lse, Tensor query, Tensor memory, MaybeTensor position, MaybeTensor bias,
    MaybeTensor key_mask, MaybeTensor index, MaybeTensor window, Tensor lse, Tensor probability, double scale,
    bool need_query, bool need_memory, bool need_position, bool need_bias) {
  check_options(index, window);
  const HeldMemory held(memory, position, bias, key_mask);
  const LayerGradients made =
      layer_gradients(held, {grad_out, grad_lse, query, lse, probability, scale, need_query, need_bias}, bias);
  const LayerRows rows{query.size(1), data_of(made.query), data_of(made.grad_out), data_of(made.stash),
                       data_of(made.score)};
  const auto [d_memory, d_position] = memory_gradients(held.memory, memory, {rows}, need_memory, need_position);
  return {made.d_query, d_memory, d_position, made.d_bias};
}

// The half of the backward of a shared memory that a layer does: its own gradients, and scale times the gradient of its
// scores.
std::tuple<Tensor, Tensor, Tensor> attend_memory_layer_backward(MaybeTensor grad_out, MaybeTensor grad_lse,
                                                                Tensor query, Tensor memory, MaybeTensor position,
                                                                MaybeTensor bias, MaybeTensor key_mask, Tensor lse,
                                                                Tensor probability, double scale, bool need_query,
                                                                bool need_bias) {
  const HeldMemory held(memory, position, bias, key_mask);
  const LayerGradients made =
      layer_gradients(held, {grad_out, grad_lse, query, lse, probability, scale, need_query, need_bias}, bias);
  return {made.d_query, made.d_bias, made.score};
}

// The other half: the gradients of memory and position from all layers. Each list holds one float32, contiguous tensor
// a layer, in the same order; an empty grad_out stands for none.
std::tuple<Tensor, Tensor> attend_memory_shared_backward(Tensor memory, std::vector<Tensor> probability,
                                                         std::vector<Tensor> score, std::vector<Tensor> query,
                                                         std::vector<Tensor> grad_out, bool need_position) {
  const Memory shape{
      element_type(memory.scalar_type()), memory.size(0), memory.size(1), memory.size(2), {}, {}, nullptr, nullptr};
  std::vector<LayerRows> layers;
  for (size_t i = 0; i < query.size(); ++i) {
    layers.push_back({query[i].size(1), data_of(query[i]), grad_out[i].dim() == 3 ? data_of(grad_out[i]) : nullptr,
                      data_of(probability[i]), data_of(score[i])});
  }
  return memory_gradients(shape, memory, layers, true, need_position);
}

// attend_memory between the products of each head, for calls without gradients.
std::tuple<Tensor, Tensor> attend_heads_op(Tensor query, Tensor key_weight, Tensor value_weight, Tensor memory,
                                           MaybeTensor position, MaybeTensor bias, MaybeTensor key_mask, int64_t heads,
                                           double scale) {
  const HeldMemory held(memory, position, bias, key_mask);
  const int64_t clips = query.size(0), queries = query.size(1), narrow = query.size(2);
  const Tensor dense = torch::stable::contiguous(query), by_key = torch::stable::contiguous(key_weight);
  const Tensor by_value = torch::stable::contiguous(value_weight);
  const Tensor out = new_floats(query, {clips, queries, narrow}), lse = new_floats(query, {clips, queries * heads});
  if (clips * queries > 0) {
    attend_heads(held.memory,
                 {queries, heads, narrow / heads, static_cast<float>(scale), data_of(dense), data_of(by_key),
                  data_of(by_value), fill_of(out), fill_of(lse)},
                 kernels(), torch_workers());
  }
  return {out, lse};
}

// The products of heads alone. All tensors are float32 and contiguous.
HeadShape shape_of(int64_t count, const Tensor& weight, int64_t heads) {
  return {count, heads, weight.size(0) / heads, weight.size(1)};
}

Tensor expand(Tensor narrow, Tensor weight, int64_t heads) {
  const Tensor wide = new_floats(narrow, {narrow.size(0), heads, weight.size(1)});
  expand_heads(shape_of(narrow.size(0), weight, heads), data_of(narrow), data_of(weight), fill_of(wide), kernels(),
               torch_workers());
  return wide;
}

Tensor contract(Tensor wide, Tensor weight) {
  const Tensor narrow = torch::stable::new_empty(wide, {wide.size(0), weight.size(0)});
  contract_heads(shape_of(wide.size(0), weight, wide.size(1)), data_of(wide), data_of(weight), fill_of(narrow),
                 kernels(), torch_workers());
  return narrow;
}

Tensor correlate(Tensor narrow, Tensor wide) {
  const Tensor weight = torch::stable::new_empty(narrow, {narrow.size(1), wide.size(2)});
  correlate_heads(shape_of(narrow.size(0), weight, wide.size(1)), data_of(narrow), data_of(wide), fill_of(weight),
                  kernels(), torch_workers());
  return weight;
}

}  // namespace
}  // namespace bridge_stg

STABLE_TORCH_LIBRARY_IMPL(bridge_stg_native, CPU, m) {
  m.impl("attend_memory", TORCH_BOX(&bridge_stg::attend_memory));
  m.impl("attend_memory_backward", TORCH_BOX(&bridge_stg::attend_memory_backward));
  m.impl("attend_memory_layer_backward", TORCH_BOX(&bridge_stg::attend_memory_layer_backward));
  m.impl("attend_heads", TORCH_BOX(&bridge_stg::attend_heads_op));
  m.impl("attend_memory_shared_backward", TORCH_BOX(&bridge_stg::attend_memory_shared_backward));
  m.impl("expand_heads", TORCH_BOX(&bridge_stg::expand));
  m.impl("contract_heads", TORCH_BOX(&bridge_stg::contract));
  m.impl("correlate_heads", TORCH_BOX(&bridge_stg::correlate));
}
