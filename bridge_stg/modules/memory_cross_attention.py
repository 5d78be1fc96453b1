"""`MemoryCrossAttention`: `nn.MultiheadAttention` for a few queries over a memory that is key and value at once."""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.attend_memory.head_products import attend_heads
from ..ops.attend_memory.projected_attention import LIBRARIES, projected_attention
from ..ops.core.checks import FLOATING, check_choice, check_integer, check_number
from ..ops.core.modes import differentiates_functionally
from ..ops.core.native import library_obstacle
from ._attention_call import AttentionCall, AttentionWeights
from ._attention_conversion import copy_linears, copy_multihead_attention
from ._attention_masks import score_bias, split_padding
from ._linear import check_like_weight
from ._projected_memory import PackedWeights, ProjectedMemory, project_memory

Path = Literal["auto", "absorbed", "projected"]
PATHS = ("auto", "absorbed", "projected")


class MemoryCrossAttention(nn.Module):
    """Multi-head cross-attention to one memory, with the parameters and state dict of `nn.MultiheadAttention`.

    Two ways compute the same function:

    - absorbed: each head's W_k is folded into its few queries and W_v applied after, with `ops.attend_memory`
      over the raw memory between them. No keys or values are written.
    - projected: keys and values of all memory rows, then `ops.projected_attention`.

    Give several layers over one memory `ops.share_memory(memory)` in its place: its gradient is then computed once.
    `MultiLayerQueryCrossAttention` also projects once.

    Constructor and call take the arguments of `nn.MultiheadAttention`, by name and by position;
    `docs/compatibility_attention.md` lists what is the same. `batch_first` is True and `need_weights` False by
    default. A row that sees no key is NaN in `nn.MultiheadAttention`; here it attends to nothing: its output is
    `out_proj.bias` and its weights are 0.

    Args:
        embed_dim: width of queries and output.
        num_heads: heads; must divide `inner_dim`.
        dropout: share of the attention weights that are set to 0 in training.
        bias: whether the projections have a bias.
        add_bias_kv, add_zero_attn: must be False.
        kdim, vdim: width of the keys and of the values, `embed_dim` if None.
        batch_first: whether tensors are [B, length, width] or [length, B, width].
        path: "auto" chooses by shape (`uses_absorption`); the others force one way. A call that cannot absorb is
            projected: one with a value that is not the memory, `attn_mask`, dropout in training, or `need_weights`.
        library: the library that attends to projected keys and values, one of "flash_attn", "xformers", "sdpa" and
            "flex"; None chooses.
        inner_dim: width of all heads together, `embed_dim` if None.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, `num_heads` does not divide the
            width, or path or library is unknown.
    """

    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    q_proj_weight: Tensor | None
    k_proj_weight: Tensor | None
    v_proj_weight: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        path: Path = "auto",
        library: str | None = None,
        inner_dim: int | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_integer(name, "embed_dim", embed_dim, 1)
        check_integer(name, "num_heads", num_heads, 1)
        for width, value in {"kdim": kdim, "vdim": vdim, "inner_dim": inner_dim}.items():
            if value is not None:
                check_integer(name, width, value, 1)
        inner = embed_dim if inner_dim is None else inner_dim
        if inner % num_heads:
            divided = "embed_dim" if inner_dim is None else "inner_dim"
            raise ValueError(f"num_heads must divide {divided}={inner}, got {num_heads}.")
        if not 0.0 <= check_number(name, "dropout", dropout) <= 1.0:
            raise ValueError(f"{name}: dropout must be in 0..1, got {dropout}.")
        if add_bias_kv or add_zero_attn:
            raise ValueError(f"{name}: add_bias_kv and add_zero_attn must be False: added rows are no memory.")
        if path not in PATHS:
            raise ValueError(f"path must be 'auto', 'absorbed' or 'projected', got {path!r}.")
        if library is not None:
            check_choice(name, "library", library, tuple(LIBRARIES))
        if dtype is not None and dtype not in FLOATING:
            raise TypeError(f"{name}: dtype must be floating point, got {dtype}.")
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.inner_dim = inner
        self.num_heads = num_heads
        self.head_dim = inner // num_heads
        self.dropout = float(dropout)
        self.batch_first = batch_first
        self.path: Path = path
        self.library = library
        # Code written for `nn.MultiheadAttention` reads these.
        self.bias_k = self.bias_v = None
        self.add_zero_attn = False
        self._qkv_same_embed_dim = False  # if True, nn.TransformerEncoderLayer multiplies the weights itself

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        packed = self.kdim == self.vdim == inner == embed_dim
        self.register_parameter("in_proj_weight", empty(3 * inner, embed_dim) if packed else None)
        for part, size in {"q": embed_dim, "k": self.kdim, "v": self.vdim}.items():
            self.register_parameter(f"{part}_proj_weight", None if packed else empty(inner, size))
        self.register_parameter("in_proj_bias", empty(3 * inner) if bias else None)
        self.out_proj = nn.Linear(inner, embed_dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as `nn.MultiheadAttention` does."""
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if (weight := getattr(self, name)) is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    @classmethod
    def from_multihead_attention(cls, attention: nn.MultiheadAttention, path: Path = "auto") -> MemoryCrossAttention:
        """Build a module with the layout, mode and a copy of the parameters of `attention`; frozen ones stay frozen.

        Raises:
            TypeError: `attention` is not an `nn.MultiheadAttention`.
            ValueError: it adds key and value rows, has hooks or a forward of its own (offloaded, quantised), or its
                `out_proj` is not a plain linear layer (adapted).
        """
        return copy_multihead_attention(cls, attention, path)

    @classmethod
    def from_linears(
        cls,
        q: nn.Linear,
        k: nn.Linear,
        v: nn.Linear,
        out: nn.Linear,
        num_heads: int,
        *,
        dropout: float = 0.0,
        batch_first: bool = True,
        path: Path = "auto",
    ) -> MemoryCrossAttention:
        """Build a module with a copy of four projections, as most models keep them; frozen ones stay frozen.

        Scores are scaled by 1 / sqrt(head_dim). Widths may differ, but `q`, `k` and `v` must have as many outputs. If
        only some of them have a bias, it is 0 for the others.

        Args:
            q: projects queries to all heads.
            k, v: project the memory, or keys and values, to all heads.
            out: projects all heads to the output.
            num_heads: number of heads.
            dropout, batch_first, path: as in the class.

        Raises:
            TypeError, ValueError: a layer is not a plain `nn.Linear` (adapted, quantised, hooked), or its width, dtype
                or device does not fit the others.
        """
        return copy_linears(cls, q, k, v, out, num_heads, dropout=dropout, batch_first=batch_first, path=path)

    def uses_absorption(
        self, queries: int, rows: int, device_type: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> bool:
        """Whether "auto" absorbs, for Q `queries` over M `rows`, H heads, memory width C and inner width E.

        With the compiled library, in float32 on a CPU: Q (2 E C + M (H C - E)) <= 1.25 M C E. Elsewhere
        Q (E C + M (H C - E)) <= 0.7 M C E, and on CUDA C <= 512.

        Between the projections that both ways share, a clip takes 2 Q E C + 2 Q H M C multiply-adds absorbed, and
        2 M C E + 2 Q M E projected. They are equal near Q = head_dim for a long memory, and earlier for a short one.
        The factors are measured and hold forward and backward. With torch's products, which are thinner when absorbed,
        times are equal at 0.5..0.8 of the count; with the compiled kernels, which keep a block of keys in the cache,
        above 1. Wider memories do not fit the tiles of the fused CUDA kernels.
        """
        width, inner = self.kdim, self.inner_dim
        if width != self.vdim or (device_type == "cuda" and width > 512):
            return False
        native = device_type == "cpu" and dtype == torch.float32 and library_obstacle("cpu") is None
        fold, share = (2, 1.25) if native else (1, 0.7)
        cost = queries * (fold * inner * width + rows * (self.num_heads * width - inner))
        fewer = cost <= share * rows * width * inner
        if torch.compiler.is_exporting():  # a guard would narrow a dynamic size; projecting is right for every size
            from torch.fx.experimental.symbolic_shapes import statically_known_true

            return statically_known_true(fewer)
        return bool(fewer)

    def absorbs(self, queries: int, rows: int, device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> bool:
        """Whether this module absorbs if a call can: as `path` says, or by `uses_absorption`."""
        if self.path == "auto":
            return self.uses_absorption(queries, rows, device_type, dtype)
        return self.path == "absorbed" and self.kdim == self.vdim

    def forward(
        self,
        query: Tensor,
        memory: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        key: Tensor | None = None,
        position: Tensor | None = None,
        bias: Tensor | None = None,
        need_mass: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `query` to `memory`.

        Args:
            query: [B, Q, C] ([Q, B, C] if not `batch_first`; [Q, C] without clips, and then no B anywhere).
            memory: [B, M, kdim] ([M, B, kdim]), key and value.
            value: [B, M, vdim]. Where it is not the memory itself (the same object), both are projected.
            key_padding_mask: [B, M]; bool, True for a key to ignore, or floating point, to be added to the scores.
            need_weights: whether to return the weights, which forces projection. Off by default, unlike in
                `nn.MultiheadAttention`.
            attn_mask: [Q, M] or [B * H, Q, M]; bool or floating point as above, for each query; forces projection.
            average_attn_weights: whether the weights are averaged over heads.
            is_causal: a hint that `attn_mask`, which must be given, is causal; it changes nothing.
            key: the memory, by the name it has in `nn.MultiheadAttention`.
            position: shape of the memory, added to the keys only.
            bias: [B, M], added to the attention scores of every head and query; differentiable.
            need_mass: whether to return the mean weight of each key over heads and queries (`importance`), without
                dropout and as a constant to autograd; the call absorbs if it can.

        Returns:
            (output, shape of the query; weights [B, Q, M] or by head [B, H, Q, M], mass [B, M] float32, or None).

        Raises:
            TypeError, ValueError: a tensor has the wrong dtype, shape or device, or both weights and mass are asked
                for.
        """
        if (memory is None) == (key is None):
            raise TypeError("MemoryCrossAttention: the memory must be given as memory or as key, and only as one.")
        memory = cast(Tensor, key if memory is None else memory)
        one = value is None or value is memory
        if need_weights and need_mass:
            raise ValueError("need_weights and need_mass cannot both be set: the mass is the mean of the weights.")
        if is_causal and attn_mask is None:
            raise ValueError("MemoryCrossAttention: is_causal needs an attn_mask: it says that the mask is causal.")
        call = AttentionCall(query, memory, None if one else value, position, bias, key_padding_mask, attn_mask)
        call.check("MemoryCrossAttention", self.num_heads, self.batch_first, (self.embed_dim, self.kdim, self.vdim))
        weights = self._weights()
        likes = {"query": query, "memory": memory, "value": call.value, "position": position}
        check_like_weight("MemoryCrossAttention", weights.q, **likes)
        batched = query.dim() == 3
        call = call.with_clips_first(self.batch_first)
        dropout = self.dropout if self.training else 0.0
        can_absorb = one and attn_mask is None and not dropout and not need_weights and self.kdim == self.vdim
        if self.path == "auto" and not need_mass:  # absorbing has no functional derivatives
            can_absorb = can_absorb and not differentiates_functionally(query, memory, position, bias, *weights[:6])
        shape = (call.query.shape[1], call.memory.shape[1], memory.device.type, memory.dtype)
        if can_absorb and (need_mass or self.absorbs(*shape)):
            out, shown = self._absorbed(call, weights, need_mass)
        elif need_weights or need_mass:
            out, shown = self._with_weights(call, weights, dropout, need_mass)
            shown = shown.mean(dim=1) if average_attn_weights and need_weights else shown
        else:
            out, shown = self._projected(call, weights, dropout), None
        out = self.out_proj(out)
        if not batched:
            return out[0], None if shown is None else shown[0]
        return (out if self.batch_first else out.transpose(0, 1)), shown

    def _weights(self) -> AttentionWeights:
        """The parameters, each read once, because reading a parametrized weight may change it (spectral norm)."""
        packed, bias = self.in_proj_weight, self.in_proj_bias
        parts = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if packed is None else packed.chunk(3)
        q, k, v = cast(tuple[Tensor, Tensor, Tensor], parts)
        q_bias, k_bias, v_bias = (None, None, None) if bias is None else bias.chunk(3)
        return AttentionWeights(
            q, k, v, q_bias, k_bias, v_bias, None if packed is None else PackedWeights(packed, bias)
        )

    def _heads(self, x: Tensor) -> Tensor:
        """Split [B, length, E] into heads, [B, length, H, head_dim]."""
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def _absorbed(
        self, call: AttentionCall, weights: AttentionWeights, need_mass: bool
    ) -> tuple[Tensor, Tensor | None]:
        batch, count, _ = call.query.shape
        bias, padding = split_padding(call.bias, call.key_padding_mask)
        out, lse, *masses = attend_heads(
            F.linear(call.query, weights.q, weights.q_bias),
            weights.k,  # a bias of the keys cancels in the softmax
            weights.v,
            call.memory,
            self.num_heads,
            position=call.position,
            bias=bias,
            key_mask=None if padding is None else ~padding,
            scale=1.0 / math.sqrt(self.head_dim),
            return_mass=need_mass,
        )
        mass = masses[0] / (count * self.num_heads) if masses else None
        if weights.v_bias is None:
            return out, mass
        if padding is None and bias is None and call.memory.shape[1]:
            return out + weights.v_bias, mass
        # Whether a row sees a key does not depend on its head.
        seen = lse.view(batch, count, self.num_heads)[..., :1] != -torch.inf
        return out + weights.v_bias * seen, mass

    def _projected(self, call: AttentionCall, weights: AttentionWeights, dropout: float) -> Tensor:
        q, k, v = self._project(call, weights)
        bias, padding = split_padding(call.bias, call.key_padding_mask)
        term, seen = score_bias(bias, padding, call.attn_mask, self.num_heads, q.dtype)
        out = projected_attention(q, k, v, term, library=self.library, dropout=dropout)
        if seen is not None:
            out = out * seen
        return out.flatten(2)

    def _with_weights(
        self, call: AttentionCall, weights: AttentionWeights, dropout: float, need_mass: bool
    ) -> tuple[Tensor, Tensor]:
        """The output and its weights [B, H, Q, M]; with `need_mass` the mass [B, M] in place of the weights."""
        q, k, v = self._project(call, weights)
        bias, padding = split_padding(call.bias, call.key_padding_mask)
        term, seen = score_bias(bias, padding, call.attn_mask, self.num_heads, q.dtype)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        score = q @ k.transpose(2, 3) / math.sqrt(self.head_dim)
        shares = (score if term is None else score + term).softmax(dim=-1)
        if seen is not None:
            shares = shares * seen.transpose(1, 2)
        dropped = F.dropout(shares, dropout)
        out = (dropped @ v).transpose(1, 2).flatten(2)
        if not need_mass:
            return out, dropped
        kept = shares.detach()
        return out, kept.to(torch.promote_types(kept.dtype, torch.float32)).mean(dim=(1, 2))

    def _project(self, call: AttentionCall, weights: AttentionWeights) -> tuple[Tensor, Tensor, Tensor]:
        """Project to queries, keys and values, each [B, length, H, head_dim]."""
        q = self._heads(F.linear(call.query, weights.q, weights.q_bias))
        memory, position = call.memory, call.position
        if call.value is None and weights.packed is not None:
            pairs = None if torch.compiler.is_compiling() else ProjectedMemory.of(memory)
            if pairs is not None and pairs.position is position and self in pairs.by_layer:
                return q, *pairs.by_layer[self]
            return q, *project_memory([weights.packed], self.num_heads, memory, position)[0]
        keys = memory if position is None else memory + position
        values = memory if call.value is None else call.value
        return (
            q,
            self._heads(F.linear(keys, weights.k, weights.k_bias)),
            self._heads(F.linear(values, weights.v, weights.v_bias)),
        )

    def extra_repr(self) -> str:
        names = ["embed_dim", "num_heads", "path", "library"]
        widths = {"kdim": self.embed_dim, "vdim": self.embed_dim, "inner_dim": self.embed_dim, "dropout": 0.0}
        names += [name for name, usual in widths.items() if getattr(self, name) != usual]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
