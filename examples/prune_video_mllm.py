"""Put `QueryGuidedTokenPruner` into a video MLLM of your own: fewer visual tokens, and gradients that teach which.

    python examples/prune_video_mllm.py

The "MLLM" is a transformer encoder over text and visual tokens. Needs torch alone.
"""

import torch
from torch import Tensor, nn

from bridge_stg.modules import QueryGuidedTokenPruner


class VideoMLLM(nn.Module):
    """Reads a sentence and the tokens of a clip's frames; keeps a quarter of every frame's tokens."""

    def __init__(self, dim: int = 64, keep: float = 0.25) -> None:
        super().__init__()
        self.pruner = QueryGuidedTokenPruner(token_dim=dim, query_dim=dim, score_dim=32, keep=keep)
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True)
        self.language_model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.position = nn.Embedding(4096, dim)
        self.head = nn.Linear(dim, 2)

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        """Text `[B, L, D]` and visual tokens `[B, T, N, D]` to logits `[B, 2]`."""
        batch, frames, tokens, _ = visual.shape
        kept = self.pruner(visual.flatten(0, 1), text)  # B * T frames; the text of a clip serves all of its frames
        frame = torch.arange(frames, device=visual.device).repeat(batch)[:, None]
        place = self.position(frame * tokens + kept.index)  # a kept token keeps the position that it had
        gate = kept.log_gate.exp()[..., None].to(visual.dtype)  # how gradients reach the scores
        memory = (kept.tokens * gate + place).unflatten(0, (batch, frames)).flatten(1, 2)
        return self.head(self.language_model(torch.cat([text, memory], dim=1))[:, 0])


def main() -> None:
    torch.manual_seed(0)
    model = VideoMLLM()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    text, visual = torch.randn(2, 6, 64), torch.randn(2, 8, 196, 64)
    for step in range(3):
        loss = nn.functional.cross_entropy(model(text, visual), torch.tensor([0, 1]))
        loss.backward()
        assert model.pruner.token_proj.weight.grad is not None
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: {8 * model.pruner.keep_count(196)} of {8 * 196} visual tokens read, loss {loss:.3f}")


if __name__ == "__main__":
    main()
