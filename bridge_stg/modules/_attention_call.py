"""The tensors of one call of `MemoryCrossAttention`, and its parameters during that call."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..ops.core.checks import BOOLEAN, FLOATING, Expect, check_tensors
from ._projected_memory import PackedWeights

MASKS = (*BOOLEAN, *FLOATING)


class AttentionWeights(NamedTuple):
    """Weights q [E, C], k [E, kdim], v [E, vdim] and their biases [E]; `packed` holds them if they are one tensor."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    packed: PackedWeights | None


class AttentionCall(NamedTuple):
    """The tensors of a call, shaped as in `MemoryCrossAttention.forward`; `value` is None if it is the memory."""

    query: Tensor
    memory: Tensor
    value: Tensor | None
    position: Tensor | None
    bias: Tensor | None
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None

    def check(self, op: str, heads: int, batch_first: bool, widths: tuple[int, int, int]) -> None:
        """Check all tensors.

        Args:
            op: name for messages.
            heads: number of heads.
            batch_first: whether clips are the first axis.
            widths: widths of query, key and value.

        Raises:
            TypeError: a value is not a dense tensor of the right dtype.
            ValueError: a shape does not fit, or the tensors are on several devices.
        """
        for name, x in self._asdict().items():
            if isinstance(x, Tensor) and x.is_nested:
                raise TypeError(
                    f"{op}: {name} must not be nested: pad it (nn.TransformerEncoder: enable_nested_tensor=False)."
                )
        single = isinstance(self.query, Tensor) and self.query.dim() == 2
        rows = "{} {}" if single else "B {} {}" if batch_first else "{} B {}"
        keys = "M" if single else "B M"
        by_head = isinstance(self.attn_mask, Tensor) and self.attn_mask.dim() == 3
        width, key_width, value_width = widths
        sizes = check_tensors(
            op,
            Expect("query", self.query, rows.format("Q", width), FLOATING),
            Expect("memory", self.memory, rows.format("M", key_width), FLOATING),
            Expect("value", self.value, rows.format("M", value_width), FLOATING, optional=True),
            Expect("position", self.position, rows.format("M", key_width), FLOATING, optional=True),
            Expect("bias", self.bias, keys, FLOATING, optional=True),
            Expect("key_padding_mask", self.key_padding_mask, keys, MASKS, optional=True),
            Expect("attn_mask", self.attn_mask, "B*H Q M" if by_head else "Q M", MASKS, optional=True),
        )
        if self.value is None and value_width != key_width:
            raise ValueError(f"{op}: value must be given: it is {value_width} wide and the memory {key_width}.")
        planes = sizes.get("B", 1) * heads
        if sizes.get("B*H", planes) != planes:
            raise ValueError(
                f"{op}: attn_mask must have shape [Q, M] or [B*H, Q, M] with B*H={planes}, got B*H={sizes['B*H']}."
            )

    def with_clips_first(self, already: bool) -> AttentionCall:
        """The call with clips as the first axis, which is added if there was none."""
        if self.query.dim() == 2:
            return self._map(6, lambda x: x[None])
        return self if already else self._map(4, lambda x: x.transpose(0, 1))

    def _map(self, count: int, change: Callable[[Tensor], Tensor]) -> AttentionCall:
        """The call with `change` applied to its first `count` tensors."""
        names = self._fields[:count]
        return self._replace(**{name: change(x) for name in names if (x := getattr(self, name)) is not None})
