"""`attend_memory`: attention of a few query rows over a memory that is key and value at once.

It is the cross-attention of a decoder layer whose projections are absorbed, as `modules.MemoryCrossAttention` does it:
scores = (q W_k^T) x^T and out = (P x) W_v, so that keys and values are the same rows x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_kernels.attend_memory.records import AttentionInputs
from ..core.backends import choose_backend
from ..core.checks import (
    BOOLEAN,
    FLOATING,
    INT64,
    INTEGER,
    Expect,
    check_flag,
    check_number,
    check_same_dtype,
    check_tensors,
)
from ..core.modes import autocasts, refuse_transforms
from .registration import attend
from .share_memory import SharedMemory


def attend_memory(
    query: Tensor,
    memory: Tensor,
    *,
    position: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    index: Tensor | None = None,
    window: Tensor | None = None,
    scale: float,
    return_mass: bool = False,
    validate: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Attend from every query row to the rows of the memory, which are both keys and values.

    s[i, j] = scale * query[i] . (memory[j] + position[j]) + bias[j], P = softmax_j(s), out[i] = sum_j P[i, j]
    memory[j], lse[i] = log sum_j exp(s[i, j]). Products of float16 and bfloat16 accumulate in float32.

    A row that sees no key gives zeros, lse = -inf and zero gradients, never NaN. What a row of the memory that
    is hidden by `key_mask` or left out by `index` holds does not matter, NaN included.

    Differentiable in query, memory, position and bias, through out and lse; once, not twice, and in reverse mode
    alone. The mass is a constant to autograd. Forward and backward are bitwise reproducible on one device.

    Args:
        query: [B, R, C] floating point, R = heads x queries.
        memory: [B, M, C], dtype of the query (under autocast any; query, memory and position are then cast).
        position: [B, M, C], dtype of the query, added to the keys only.
        bias: [B, M] floating point, added to the scores of every row.
        key_mask: [B, M] bool, True for a key that may be seen, as in `scaled_dot_product_attention`; None for all.
        index: [B, K] int64, rows of the memory to attend to, without a compacted copy. A row named twice is
            two keys. A value outside 0..M-1, such as the -1 of a padded list, is no key at all.
        window: [B, R, 2] int32 or int64, the keys [start, end) that each row may see: rows of the memory, or
            places in `index` where that is given. Bounds outside the keys are cut off.
        scale: factor on the products, such as 1 / sqrt(head_dim): a finite number that float32 holds.
        return_mass: whether to return the attention mass of each key.
        validate: whether to check the values of `index` and `window`, which waits for the device.
        backend: one of `bridge_stg.backends()`; None picks.

    Returns:
        (out [B, R, C] dtype of the query, lse [B, R] float32), and with `return_mass` also mass [B, M] float32,
        mass[j] = sum_i exp(s[i, j] - lse[i]). float64 inputs give float64 lse and mass.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; a backend that
            cannot run; with `validate`, an index outside -1..M-1 or a window whose end lies before its start.
        NotImplementedError: a second derivative, or one by `torch.func` (`grad`, `jvp`).
    """
    sizes = check_tensors(
        "attend_memory",
        Expect("query", query, "B R C", FLOATING),
        Expect("memory", memory, "B M C", FLOATING),
        Expect("position", position, "B M C", FLOATING, optional=True),
        Expect("bias", bias, "B M", FLOATING, optional=True),
        Expect("key_mask", key_mask, "B M", BOOLEAN, optional=True),
        Expect("index", index, "B K", INT64, optional=True),
        Expect("window", window, "B R 2", INTEGER, optional=True),
    )
    if not autocasts(query.device.type):
        check_same_dtype("attend_memory", "query", query, memory=memory, position=position)
    factor = check_number("attend_memory", "scale", scale)
    return_mass = check_flag("attend_memory", "return_mass", return_mass)
    refuse_transforms("attend_memory", query, memory, position, bias)
    if check_flag("attend_memory", "validate", validate) and not query.is_meta:  # meta tensors have no values
        _check_values(index, window, sizes["M"])
    inputs = AttentionInputs(query, memory, position, bias, key_mask, index, window, factor)
    chosen = choose_backend("attend_memory", backend, query.device.type, inputs=inputs)
    stash = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:4])
    shared = SharedMemory.of(memory) if stash and not torch.compiler.is_compiling() else None
    if shared is not None and shared.defers(inputs, chosen):
        out, lse, mass = shared.attend(inputs, return_mass, chosen)
    else:
        out, lse, mass, _ = attend(inputs, return_mass, stash, chosen)
    return (out, lse, mass.detach()) if return_mass else (out, lse)


def _check_values(index: Tensor | None, window: Tensor | None, rows: int) -> None:
    if index is not None and index.numel():
        low, high = (int(x) for x in index.aminmax())
        if low < -1 or high >= rows:
            wrong = low if low < -1 else high
            raise ValueError(f"attend_memory: index must be in -1..{rows - 1} (rows of the memory), got {wrong}.")
    if window is not None and bool((window[..., 1] < window[..., 0]).any()):
        start, end = window[window[..., 1] < window[..., 0]][0].tolist()
        raise ValueError(f"attend_memory: window must have start <= end, got [{start}, {end}).")
