"""Replace the cross-attention of a trained DETR decoder, and keep its weights and its outputs.

    python examples/detr_decoder.py

A DETR decoder asks few queries about a large memory. `MemoryCrossAttention` multiplies the key and value projections
into the queries, so that it never projects the memory. It needs torch alone.
"""

import time

import torch
from torch import Tensor, nn

from bridge_stg.modules import MemoryCrossAttention


def replace_cross_attention(decoder: nn.TransformerDecoder) -> None:
    """Give every layer the drop-in module, with a copy of the layer's own parameters."""
    for layer in decoder.layers:
        layer.multihead_attn = MemoryCrossAttention.from_multihead_attention(layer.multihead_attn)


def timed(decoder: nn.Module, queries: Tensor, memory: Tensor) -> tuple[Tensor, float]:
    """Return the output and the milliseconds of a second call; the first call warms up."""
    with torch.inference_mode():
        decoder(queries, memory)
        start = time.perf_counter()
        output = decoder(queries, memory)
    return output, 1e3 * (time.perf_counter() - start)


def main() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(256, 8, 1024, dropout=0.0, batch_first=True)
    decoder = nn.TransformerDecoder(layer, 6).eval()
    queries, memory = torch.randn(1, 16, 256), torch.randn(1, 2048, 256)

    before, time_before = timed(decoder, queries, memory)
    replace_cross_attention(decoder)
    after, time_after = timed(decoder, queries, memory)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    print(f"largest difference {(after - before).abs().max():.1e}")
    print(f"{time_before:.0f} ms before, {time_after:.0f} ms after")


if __name__ == "__main__":
    main()
