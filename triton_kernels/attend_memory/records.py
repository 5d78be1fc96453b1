"""The records of one `attend_memory` call, which every backend takes.

Triton is not needed to import them: `ops.attend_memory.registration` packs them for all backends.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionInputs(NamedTuple):
    """What the rows of a call attend to, and how. The fields stand in the order of the registered op's arguments.

    Attributes:
        query: [B, R, C] floating point.
        memory: [B, M, C], dtype of the query; the keys and the values.
        position: [B, M, C], dtype of the query, added to the keys; or None.
        bias: [B, M] floating point, added to the scores of every row; or None.
        key_mask: [B, M] bool, True for a key that may be seen; None for all.
        index: [B, K] int64, rows of the memory to attend to; None for all rows in order, K = M.
        window: [B, R, 2] int32 or int64, the keys [start, end) that each row may see; None for all.
        scale: factor on the products.
    """

    query: Tensor
    memory: Tensor
    position: Tensor | None
    bias: Tensor | None
    key_mask: Tensor | None
    index: Tensor | None  # type: ignore[assignment]  # it hides tuple.index, which nobody calls
    window: Tensor | None
    scale: float

    @property
    def key_count(self) -> int:
        """K, the number of keys of a clip."""
        return self.memory.shape[1] if self.index is None else self.index.shape[1]


class AttentionBackward(NamedTuple):
    """What the backward of a call computes its gradients from.

    Attributes:
        inputs: the inputs of the forward.
        grad_out: [B, R, C] gradient of out; None for zeros.
        grad_lse: [B, R] gradient of lse; None for zeros.
        lse: [B, R] as the forward returned it.
        saved: what the backend kept: the probabilities P, or out for "triton"; an empty tensor where it kept nothing.
        need_query, need_memory, need_position, need_bias: which gradients are wanted.
    """

    inputs: AttentionInputs
    grad_out: Tensor | None
    grad_lse: Tensor | None
    lse: Tensor
    saved: Tensor
    need_query: bool
    need_memory: bool
    need_position: bool
    need_bias: bool
