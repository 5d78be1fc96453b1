"""What FSDP2 needs to know of the model: the spatial half is sharded in parts of its own, in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh


def shard_spatial_half(model: Any, mesh: DeviceMesh | None) -> None:
    """Apply `fully_shard` to every module of the spatial half, in place, before the rest of the model is sharded.

    Mixed precision of the rest casts weights to bfloat16 as they are gathered; boxes in bfloat16 would be off by
    0.4% of a frame.

    Args:
        model: a `BridgeSTGForVideoGrounding`.
        mesh: of the processes; None takes the default one.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for name, module in model.named_children():
        if name != "backbone" and any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh, mp_policy=policy)


def layers_to_shard(model: Any) -> list[str]:
    """Names of the classes that FSDP2 gathers one at a time: the layers of the LLM and of the vision tower."""
    backbone: Any = model.backbone.model
    stacks: list[nn.ModuleList] = [backbone.language_model.layers, backbone.visual.blocks]
    return sorted({type(layer).__name__ for stack in stacks for layer in stack})


def shard_on_cpu_too() -> None:
    """Let accelerate use FSDP2 in a group of CPU processes.

    It looks for FSDP only where its processes are on accelerators, though nothing that it does then needs one.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if PartialState().distributed_type is DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
