"""`MemoryCrossAttention` from the parameters of other attentions."""

from __future__ import annotations

from typing import Any, cast

import accelerate
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bridge_stg.modules import MemoryCrossAttention

B = 2


def attend(linears: tuple[nn.Linear, ...], heads: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (
        layer(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for layer, x in zip(linears, (query, key, value), strict=False)
    )
    attended = nn.functional.scaled_dot_product_attention(q, k, v)
    return linears[3](attended.transpose(1, 2).flatten(2))


# Widths of query, key, value, all heads and output; heads, queries, rows; which of q, k, v, out have a bias.
MODELS = {
    "DETR": (256, 256, 256, 256, 256, 8, 100, 400, "qkvo"),
    "Whisper": (384, 384, 384, 384, 384, 6, 4, 1500, "qvo"),
    "Q-Former": (768, 1408, 1408, 768, 768, 12, 32, 257, "qkvo"),
    "SAM 2 mask decoder": (256, 256, 256, 128, 256, 8, 7, 1024, "qkvo"),
    "SAM 2 memory": (256, 64, 64, 256, 256, 1, 64, 300, "qkvo"),
    "Perceiver": (1024, 261, 261, 261, 1024, 1, 64, 500, "qkvo"),
    "no bias but the last": (32, 32, 32, 32, 48, 4, 5, 9, "o"),
    "no bias": (32, 20, 28, 16, 32, 4, 5, 9, ""),
}


@pytest.mark.parametrize("path", ["auto", "absorbed", "projected"])
@pytest.mark.parametrize("model", MODELS)
def test_projections_of_any_width_and_bias(model, path):
    torch.manual_seed(0)
    width, kdim, vdim, inner, output, heads, queries, rows, biased = MODELS[model]
    shapes = ((width, inner, "q"), (kdim, inner, "k"), (vdim, inner, "v"), (inner, output, "o"))
    q, k, v, out = linears = tuple(nn.Linear(a, b, bias=name in biased) for a, b, name in shapes)
    made = MemoryCrossAttention.from_linears(q, k, v, out, heads, path=path)
    assert isinstance(made.in_proj_weight, nn.Parameter) == (width == kdim == vdim == inner)
    query, memory = torch.randn(B, queries, width), torch.randn(B, rows, kdim, requires_grad=True)
    value = memory if kdim == vdim else torch.randn(B, rows, vdim)
    found, expected = made(query, memory, value)[0], attend(linears, heads, query, memory, value)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(out.square().sum(), memory)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(made(query, memory, value)[0], expected, rtol=1e-5, atol=1e-5)


def test_absorption_counts_the_widths():
    memory_wide = MemoryCrossAttention(64, 4, kdim=1024, vdim=1024)
    assert memory_wide.uses_absorption(1, 4096) and not memory_wide.uses_absorption(64, 4096)
    assert not MemoryCrossAttention(64, 4, kdim=32, vdim=16).uses_absorption(1, 4096)


def test_what_is_frozen_stays_frozen():
    theirs = nn.MultiheadAttention(16, 4)
    theirs.in_proj_weight.requires_grad_(False)
    made = MemoryCrossAttention.from_multihead_attention(theirs)
    assert not made.get_parameter("in_proj_weight").requires_grad and made.out_proj.weight.requires_grad
    q, k, v, out = (nn.Linear(16, 16).requires_grad_(i == 3) for i in range(4))
    made = MemoryCrossAttention.from_linears(q, k, v, out, 4)
    assert [name for name, x in made.named_parameters() if x.requires_grad] == ["out_proj.weight", "out_proj.bias"]


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_parametrized_attention_gives_the_weights_it_has():
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    parametrize.register_parametrization(theirs, "in_proj_weight", Double())
    made = MemoryCrossAttention.from_multihead_attention(theirs)
    query, memory = torch.randn(B, 3, 16), torch.randn(B, 9, 16)
    torch.testing.assert_close(made(query, memory)[0], theirs(query, memory, memory)[0], rtol=1e-5, atol=1e-5)


def with_adapter(attention: nn.MultiheadAttention) -> None:
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["out_proj"]), attention)


def offloaded(attention: nn.MultiheadAttention) -> None:
    accelerate.cpu_offload(attention, execution_device="cpu")


def hooked(attention: nn.MultiheadAttention) -> None:
    attention.register_forward_hook(lambda module, inputs, output: None)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (with_adapter, r"out_proj must be a plain nn\.Linear, .* but it is a peft\.tuners\.lora\.layer\.Linear"),
        (offloaded, "attention must have the forward of nn.MultiheadAttention and no hooks"),
        (hooked, "attention must have the forward of nn.MultiheadAttention and no hooks"),
    ],
)
def test_what_a_copy_would_lose_is_refused(change, sentence):
    theirs = nn.MultiheadAttention(16, 4)
    change(theirs)
    with pytest.raises(ValueError, match=sentence):
        MemoryCrossAttention.from_multihead_attention(theirs)


def test_misuse_is_a_sentence():
    for other in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(ValueError, match="must be without add_bias_kv and add_zero_attn"):
            MemoryCrossAttention.from_multihead_attention(nn.MultiheadAttention(8, 2, **other))
    with pytest.raises(TypeError, match=r"attention must be a torch\.nn\.MultiheadAttention, got a torch\..*\.Linear"):
        MemoryCrossAttention.from_multihead_attention(cast(Any, nn.Linear(3, 3)))
    q, k, v, out = (nn.Linear(8, 8) for _ in range(4))
    convert: Any = MemoryCrossAttention.from_linears
    with pytest.raises(ValueError, match=r"v\.out_features must be q\.out_features \(8\), got 4"):
        convert(q, k, nn.Linear(8, 4), out, 2)
    with pytest.raises(ValueError, match=r"out\.in_features must be q\.out_features \(8\), got 4"):
        convert(q, k, v, nn.Linear(4, 8), 2)
    with pytest.raises(ValueError, match=r"k must be a plain nn\.Linear, .* but it is a torch\..*\.Conv1d"):
        convert(q, nn.Conv1d(8, 8, 1), v, out, 2)
    with pytest.raises(TypeError, match=r"k must be an nn\.Linear, got NoneType"):
        convert(q, None, v, out, 2)
    with pytest.raises(TypeError, match=r"v must have the dtype of the weights \(torch\.float32\), got torch\.float64"):
        convert(q, k, v.double(), out, 2)
    with pytest.raises(ValueError, match="num_heads must divide inner_dim=8, got 3"):
        convert(q, k, nn.Linear(8, 8), out, 3)
