"""Sharding a model with FSDP2: which modules are sharded on their own, and in which precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh


def shard_spatial_half(model: Any, mesh: DeviceMesh | None) -> None:
    """Apply `fully_shard` to every module of the spatial half, in place, before the rest of the model is sharded.

    The spatial half stays in float32: FSDP2 casts the other weights to bfloat16 as it gathers them, and boxes in
    bfloat16 would be off by 0.4% of a frame.

    Args:
        model: a `BridgeSTGForVideoGrounding`.
        mesh: device mesh of the ranks; None takes the default one.
    """
    from torch.distributed.fsdp import fully_shard

    policy = mixed_precision(torch.float32)
    for name, module in model.named_children():
        if name != "backbone" and any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh, mp_policy=policy)


def mixed_precision(dtype: torch.dtype) -> Any:
    """The policy that gathers weights in `dtype`, sums gradients in float32 and casts no inputs (times and boxes)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def layers_to_shard(model: Any) -> list[str]:
    """Names of the classes of layers that FSDP2 gathers one at a time, of the LLM and of the vision tower."""
    backbone: Any = model.backbone.model
    stacks: list[nn.ModuleList] = [backbone.language_model.layers, backbone.visual.blocks]
    return sorted({type(layer).__name__ for stack in stacks for layer in stack})


def load_sharded_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read what accelerate's `save_fsdp_optimizer` wrote, into the shards of any number of ranks.

    Parameters that had no state when it was written have none afterwards: torch gives every parameter a state before it
    loads, which would count as a first step.
    """
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    reader = FileSystemReader(folder)
    saved = {key.rpartition(".")[0] for key in reader.read_metadata().state_dict_metadata}
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    load(state, storage_reader=reader, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state["optimizer"])
    for name, parameter in model.named_parameters():
        if f"optimizer.state.{name}" not in saved:
            optimizer.state.pop(parameter, None)


def shard_on_cpu_too() -> None:
    """Let accelerate use FSDP2 in a group of CPU processes, for which it does not look for FSDP otherwise."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if PartialState().distributed_type is DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
