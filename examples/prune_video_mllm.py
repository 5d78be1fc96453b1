"""Put `QueryGuidedTokenPruner` into a video MLLM: it reads fewer visual tokens, and learns which ones to read.

    python examples/prune_video_mllm.py

The MLLM of this example is a small transformer over text and visual tokens. It needs torch alone.
"""

import torch
from torch import Tensor, nn

from bridge_stg.modules import QueryGuidedTokenPruner


class VideoMLLM(nn.Module):
    """Classifies a clip by a sentence, and reads a quarter of every frame's tokens."""

    def __init__(self, dim: int = 64, keep: float = 0.25) -> None:
        super().__init__()
        self.pruner = QueryGuidedTokenPruner(token_dim=dim, query_dim=dim, score_dim=32, keep=keep)
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True)
        self.language_model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.position = nn.Embedding(4096, dim)
        self.head = nn.Linear(dim, 2)

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        """Return logits `[B, 2]` for text `[B, L, D]` and visual tokens `[B, T, N, D]`."""
        clips, frames, tokens, _ = visual.shape
        # The pruner sees B * T frames. The text of a clip guides the choice in all of its frames.
        kept = self.pruner(visual.flatten(0, 1), text)
        # A kept token keeps the position that it had among all tokens of the clip.
        frame = torch.arange(frames, device=visual.device).repeat(clips)[:, None]
        position = self.position(frame * tokens + kept.index)
        # The gate multiplies each kept token, so that gradients of the loss reach the scores.
        gate = kept.log_gate.exp()[..., None].to(visual.dtype)
        memory = (kept.tokens * gate + position).unflatten(0, (clips, frames)).flatten(1, 2)
        return self.head(self.language_model(torch.cat([text, memory], dim=1))[:, 0])


def main() -> None:
    torch.manual_seed(0)
    model = VideoMLLM()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    text, visual = torch.randn(2, 6, 64), torch.randn(2, 8, 196, 64)
    print(f"{8 * model.pruner.keep_count(196)} of {8 * 196} visual tokens are read")
    for step in range(3):
        loss = nn.functional.cross_entropy(model(text, visual), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gradient = model.pruner.token_proj.weight.grad.norm()
        print(f"step {step}: loss {loss:.3f}, gradient of the pruner's projection {gradient:.1e}")


if __name__ == "__main__":
    main()
