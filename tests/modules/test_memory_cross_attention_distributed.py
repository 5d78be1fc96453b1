"""A decoder over one shared memory in two processes: DDP, and FSDP2 around the decoder and around each layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bridge_stg.modules import MultiLayerQueryCrossAttention
from bridge_stg.ops.attend_memory.registration import SHARED_BACKENDS

L, B, Q, M, C = 3, 2, 4, 9, 16
PROCESSES = 2


class Decoder(nn.Module):
    """Encodes a memory and decodes over it; `share` says whether the layers share it."""

    def __init__(self, path, share: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(C, C)
        self.attention = MultiLayerQueryCrossAttention(C, 4, L, path=path)
        self.share = share

    def forward(self, query: Tensor, frames: Tensor) -> Tensor:
        memory = self.encoder(frames)
        memory = self.attention.share(memory, queries=Q, fuse=True) if self.share else memory
        for i in range(L):
            query = query + self.attention.layer(i, query, memory)
        return query.square().mean()


def batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(B, Q, C, generator=generator), torch.randn(B, M, C, generator=generator)


def expected_gradients(path) -> dict[str, Tensor]:
    """Means over the processes' batches, in one process and with nothing shared."""
    model = Decoder(path, share=False)
    for rank in range(PROCESSES):
        (model(*batch(rank)) / PROCESSES).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def work(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=PROCESSES)
    calls: list[int] = []

    def counted(memory_backward):
        def count(rows, *args):
            calls.append(len(rows))
            return memory_backward(rows, *args)

        return count

    for name, backend in SHARED_BACKENDS.items():
        SHARED_BACKENDS[name] = backend._replace(memory_backward=counted(backend.memory_backward))
    for path in ("absorbed", "projected"):
        expected = expected_gradients(path)
        for wrap, deferred in ((ddp, [L]), (fsdp_decoder, [L]), (fsdp_layers, [])):
            model = wrap(Decoder(path, share=True))
            calls.clear()
            model(*batch(rank)).backward()
            assert calls == (deferred if path == "absorbed" else []), (wrap, path, calls)
            found = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
            assert found.keys() == expected.keys()
            for name, gradient in found.items():
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                torch.testing.assert_close(whole, expected[name], rtol=1e-4, atol=1e-6)
    dist.destroy_process_group()


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp_decoder(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))
    return model


def fsdp_layers(model: Decoder) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in model.attention.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo")
def test_gradients_in_two_processes(tmp_path: Path):
    torch.multiprocessing.spawn(work, (str(tmp_path / "store"),), nprocs=PROCESSES)
