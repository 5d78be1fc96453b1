"""Few-query cross-attention in a DETR decoder: swap the attention of trained layers, keep weights and outputs.

    python examples/detr_decoder.py

With few queries and a large memory, `MemoryCrossAttention` never projects the memory to keys and values. Needs torch
alone.
"""

import time

import torch
from torch import nn

from bridge_stg.modules import MemoryCrossAttention


def swap_cross_attention(decoder: nn.TransformerDecoder) -> None:
    """Replace the cross-attention of every layer by the drop-in, with the same parameters."""
    for layer in decoder.layers:
        layer.multihead_attn = MemoryCrossAttention.from_multihead_attention(layer.multihead_attn)


def main(memory_length: int = 2048) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(256, 8, 1024, dropout=0.0, batch_first=True)
    decoder = nn.TransformerDecoder(layer, 6).eval()
    queries, memory = torch.randn(1, 16, 256), torch.randn(1, memory_length, 256)

    def run() -> tuple[torch.Tensor, float]:
        with torch.inference_mode():
            decoder(queries, memory)
            start = time.perf_counter()
            output = decoder(queries, memory)
        return output, time.perf_counter() - start

    before, slow = run()
    swap_cross_attention(decoder)
    after, fast = run()
    print(
        f"largest difference {(before - after).abs().max():.1e}; {slow * 1e3:.0f} ms before, {fast * 1e3:.0f} ms after"
    )


if __name__ == "__main__":
    main()
