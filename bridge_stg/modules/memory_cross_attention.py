"""`MemoryCrossAttention`: `nn.MultiheadAttention` for a few queries over a memory that is key and value at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops._checks import BOOLEAN, FLOATING, Expect, check_choice, check_tensors
from ..ops._head_products import attend_heads
from ..ops._native import library_obstacle
from ..ops.projected_attention import LIBRARIES, projected_attention

Path = Literal["auto", "absorbed", "projected"]

# The `ProjectedMemory` of each memory that `MultiLayerQueryCrossAttention.share` projected.
PROJECTED = WeakTensorKeyDictionary()


class MemoryCrossAttention(nn.Module):
    """Multi-head cross-attention to one memory, with the parameters and state dict of `nn.MultiheadAttention`.

    Two ways compute the same function:

    - absorbed: each head's W_k is folded into its few queries and W_v applied after, with `ops.attend_memory`
      over the raw memory between them. No keys or values are written.
    - projected: keys and values of all memory rows, then `ops.projected_attention`.

    Several layers over one memory should be given `ops.share_memory(memory)` in its place: its gradient is then made
    once. `MultiLayerQueryCrossAttention` also projects once.

    A row that sees no key, which is NaN in `nn.MultiheadAttention`, attends to nothing: its output is
    `out_proj.bias`. Attention dropout and `attn_mask` are not offered.

    Args:
        embed_dim: width of queries, memory and output.
        num_heads: heads; must divide `embed_dim`.
        bias: whether the projections have a bias.
        batch_first: whether tensors are [B, length, C] or [length, B, C].
        path: "auto" picks by shape (`uses_absorption`); the others force one way.
        library: what attends to projected keys and values, one of "flash_attn", "xformers", "sdpa" and "flex"; None
            picks.

    Raises:
        ValueError: `num_heads` does not divide `embed_dim`; an unknown path or library.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        bias: bool = True,
        batch_first: bool = True,
        path: Path = "auto",
        library: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim={embed_dim}, got {num_heads}.")
        if path not in ("auto", "absorbed", "projected"):
            raise ValueError(f"path must be 'auto', 'absorbed' or 'projected', got {path!r}.")
        if library is not None:
            check_choice("MemoryCrossAttention", "library", library, tuple(LIBRARIES))
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.batch_first = batch_first
        self.path: Path = path
        self.library = library
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, device=device, dtype=dtype))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, device=device, dtype=dtype)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as `nn.MultiheadAttention` does."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    @classmethod
    def from_multihead_attention(cls, attention: nn.MultiheadAttention, path: Path = "auto") -> MemoryCrossAttention:
        """A module with the layout and a copy of the parameters of `attention`.

        Raises:
            ValueError: `attention` has dropout, another key or value width, or added key and value rows.
        """
        if attention.dropout:
            raise ValueError(
                f"MemoryCrossAttention has no attention dropout: set dropout to 0 first, got {attention.dropout}."
            )
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError(
                "MemoryCrossAttention needs an nn.MultiheadAttention with kdim = vdim = embed_dim and without "
                "add_bias_kv or add_zero_attn."
            )
        weight = attention.in_proj_weight
        made = cls(
            attention.embed_dim,
            attention.num_heads,
            bias=attention.in_proj_bias is not None,
            batch_first=attention.batch_first,
            path=path,
            device=weight.device,
            dtype=weight.dtype,
        )
        made.load_state_dict(attention.state_dict())
        made.train(attention.training)
        return made

    def uses_absorption(self, queries: int, rows: int, device_type: str = "cpu") -> bool:
        """The rule of "auto", for Q `queries` over M `rows`, H heads and width C.

        With the compiled library, in float32 on a CPU: Q (2 C + (H - 1) M) <= 1.25 M C. Elsewhere
        Q (C + (H - 1) M) <= 0.7 M C, and on CUDA C <= 512.

        Absorbed, a clip takes 2 Q C^2 + 2 Q H M C multiply-adds between the projections that both ways share;
        projected, 2 M C^2 + 2 Q M C. Break-even lies near Q = head_dim for a long memory, earlier for a short one.
        The numbers are measured, forward and backward alike: absorbed as products of torch, which are the thinner ones,
        the ways break even at 0.5..0.8 of the count; by the compiled kernels, which keep a block of keys near for all
        that is done with it, beyond it. Wider memories do not fit the tiles of the fused CUDA kernels.
        """
        width = self.embed_dim
        if device_type == "cpu" and self.in_proj_weight.dtype == torch.float32 and library_obstacle("cpu") is None:
            return queries * (2 * width + (self.num_heads - 1) * rows) <= 1.25 * rows * width
        if device_type == "cuda" and width > 512:
            return False
        return queries * (width + (self.num_heads - 1) * rows) <= 0.7 * rows * width

    def absorbs(self, queries: int, rows: int, device_type: str = "cpu") -> bool:
        """Whether this module goes the absorbed way: as `path` says, or by the rule."""
        if self.path == "auto":
            return self.uses_absorption(queries, rows, device_type)
        return self.path == "absorbed"

    def forward(
        self,
        query: Tensor,
        memory: Tensor,
        value: Tensor | None = None,
        *,
        position: Tensor | None = None,
        bias: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        need_mass: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `query` to `memory`.

        Args:
            query: [B, Q, C] ([Q, B, C] if not `batch_first`).
            memory: [B, M, C] ([M, B, C]), key and value.
            value: accepted where `nn.MultiheadAttention` takes it, and must then be `memory` itself.
            position: shape of the memory, added to the keys only.
            bias: [B, M], added to the attention scores of every head and query; differentiable.
            key_padding_mask: [B, M] bool, True for a key to ignore, as in `nn.MultiheadAttention`.
            need_weights: whether to return the weights, averaged over heads; takes the projected way. Off by
                default, unlike in `nn.MultiheadAttention`.
            need_mass: whether to return the mean weight of each key over heads and queries (`importance`); takes the
                absorbed way. A constant to autograd.

        Returns:
            (output, shape of the query; weights [B, Q, M], mass [B, M] float32, or None).

        Raises:
            TypeError, ValueError: a tensor of the wrong dtype, shape or device; a `value` that is not the memory; both
                weights and mass asked for.
        """
        if value is not None and value is not memory:
            raise ValueError("value must be the memory itself; a key that differs by a position is `position`.")
        if need_weights and need_mass:
            raise ValueError("need_weights and need_mass cannot both be set: the mass is the mean of the weights.")
        shape = f"B {{}} {self.embed_dim}" if self.batch_first else f"{{}} B {self.embed_dim}"
        check_tensors(
            "MemoryCrossAttention",
            Expect("query", query, shape.format("Q"), FLOATING),
            Expect("memory", memory, shape.format("M"), FLOATING),
            Expect("position", position, shape.format("M"), FLOATING, optional=True),
            Expect("bias", bias, "B M", FLOATING, optional=True),
            Expect("key_padding_mask", key_padding_mask, "B M", BOOLEAN, optional=True),
        )
        if not self.batch_first:
            query, memory = query.transpose(0, 1), memory.transpose(0, 1)
            position = None if position is None else position.transpose(0, 1)
        weights = None
        if need_weights:
            out, weights = self._with_weights(query, memory, position, bias, key_padding_mask)
        elif need_mass or self.absorbs(query.shape[1], memory.shape[1], memory.device.type):
            out, weights = self._absorbed(query, memory, position, bias, key_padding_mask, need_mass)
        else:
            out = self._projected(query, memory, position, bias, key_padding_mask)
        out = self.out_proj(out)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _parts(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(zip(weights, biases, strict=True))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, length, C] -> [B, length, H, head_dim]."""
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def _absorbed(
        self,
        query: Tensor,
        memory: Tensor,
        position: Tensor | None,
        bias: Tensor | None,
        key_padding_mask: Tensor | None,
        need_mass: bool,
    ) -> tuple[Tensor, Tensor | None]:
        (w_q, b_q), (w_k, _), (w_v, b_v) = self._parts()  # a bias of the keys cancels in the softmax
        batch, count, _ = query.shape
        out, lse, *masses = attend_heads(
            F.linear(query, w_q, b_q),
            w_k,
            w_v,
            memory,
            self.num_heads,
            position=position,
            bias=bias,
            key_mask=None if key_padding_mask is None else ~key_padding_mask,
            scale=1.0 / math.sqrt(self.head_dim),
            return_mass=need_mass,
        )
        mass = masses[0] / (count * self.num_heads) if masses else None
        if b_v is None:
            return out, mass
        if key_padding_mask is None and bias is None:
            return out + b_v, mass
        # Whether a row sees a key does not depend on its head.
        seen = lse.view(batch, count, self.num_heads)[..., :1] != -torch.inf
        return out + b_v * seen, mass

    def _projected(
        self,
        query: Tensor,
        memory: Tensor,
        position: Tensor | None,
        bias: Tensor | None,
        key_padding_mask: Tensor | None,
    ) -> Tensor:
        q, k, v = self._project(query, memory, position)
        score_bias, seen = _score_bias(bias, key_padding_mask, q.dtype)
        out = projected_attention(q, k, v, score_bias, library=self.library)
        if seen is not None:
            out = out * seen
        return out.flatten(2)

    def _with_weights(
        self,
        query: Tensor,
        memory: Tensor,
        position: Tensor | None,
        bias: Tensor | None,
        key_padding_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = self._project(query, memory, position)
        score_bias, seen = _score_bias(bias, key_padding_mask, q.dtype)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        score = q @ k.transpose(2, 3) / math.sqrt(self.head_dim)
        weights = (score if score_bias is None else score + score_bias).softmax(dim=-1)
        if seen is not None:
            weights = weights * seen
        return (weights @ v).transpose(1, 2).flatten(2), weights.mean(dim=1)

    def _project(self, query: Tensor, memory: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, length, H, head_dim]."""
        (w_q, b_q), *_ = self._parts()
        pairs = None if torch.compiler.is_compiling() else PROJECTED.get(memory)
        if pairs is not None and pairs.position is position and self in pairs.by_layer:
            keys, values = pairs.by_layer[self]
        else:
            (keys, values), *_ = project_memory([self], memory, position)
        return self._heads(F.linear(query, w_q, b_q)), keys, values

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, path={self.path!r}, library={self.library!r}"


class ProjectedMemory(NamedTuple):
    """Keys and values that several layers made of one memory.

    Attributes:
        position: the position added to the keys, or None.
        by_layer: (keys, values), each [B, M, H, head_dim].
    """

    position: Tensor | None
    by_layer: WeakKeyDictionary[MemoryCrossAttention, tuple[Tensor, Tensor]]


def project_memory(
    layers: Sequence[MemoryCrossAttention], memory: Tensor, position: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [B, M, H, head_dim] of layers of one shape, by one product (two where there is a position)."""
    width, heads = layers[0].embed_dim, (layers[0].num_heads, layers[0].head_dim)

    def project(x: Tensor, first: int, last: int) -> list[Tensor]:
        weight = _cat([layer.in_proj_weight[first * width : last * width] for layer in layers])
        biases = [
            layer.in_proj_bias[first * width : last * width] for layer in layers if layer.in_proj_bias is not None
        ]
        bias = _cat(biases) if biases else None
        parts = F.linear(x, weight, bias).unflatten(-1, (len(layers) * (last - first), *heads))
        return list(parts.unbind(2))

    if position is None:
        parts = project(memory, 1, 3)
        return list(zip(parts[::2], parts[1::2], strict=True))
    return list(zip(project(memory + position, 1, 2), project(memory, 2, 3), strict=True))


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _score_bias(
    bias: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The additive mask [B, 1, 1, M] and whether a clip has any key, [B, 1, 1, 1]; a clip without one is unmasked.

    Softmax of a row of -inf is NaN in some kernels and zeros in others; so is its gradient.
    """
    if bias is None and key_padding_mask is None:
        return None, None
    if bias is None:
        assert key_padding_mask is not None
        total = torch.zeros(key_padding_mask.shape, dtype=dtype, device=key_padding_mask.device)
    else:
        total = bias.to(dtype)
    if key_padding_mask is not None:
        total = total.masked_fill(key_padding_mask, -torch.inf)
    seen = (total != -torch.inf).any(dim=1)[:, None]
    return torch.where(seen, total, 0.0)[:, None, None], seen[:, :, None, None]
