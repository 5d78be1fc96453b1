"""The two halves of inference on a batch: text on one KV cache, then tubes; clips may differ in length and size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..modules.boxes import cxcywh_to_xyxy
from ..modules.semantic_bridge import BridgeQueries
from .visual_tokens import VisualTokens

if TYPE_CHECKING:
    from .modeling_bridge_stg import BridgeSTGForVideoGrounding


def encode_clips(
    model: BridgeSTGForVideoGrounding, pixel_values: torch.Tensor, grid_thw: torch.Tensor
) -> list[tuple[list[int], VisualTokens]]:
    """Vision tokens of clips of any size: for every (rows, columns), which clips have it and their tokens.

    Args:
        pixel_values, grid_thw: of `BridgeSTGProcessor`.
    """
    grids = grid_thw.tolist()
    clips = pixel_values.split([groups * rows * columns for groups, rows, columns in grids])
    sizes: dict[tuple[int, int], list[int]] = {}
    for clip, (_, rows, columns) in enumerate(grids):
        sizes.setdefault((rows, columns), []).append(clip)
    return [
        (members, model.encode_video(torch.cat([clips[i] for i in members]), grid_thw[members]))
        for members in sizes.values()
    ]


class CachedDecoding:
    """One prefill, the greedy answer and the bridging forward on one KV cache; rows that end early are masked.

    Args:
        model: the model.
        input_ids, attention_mask: `[B, L]`, padded on the left.
        clips: `VisualTokens.tokens` of each clip.
        grids: int64 `[B, 2]`, (rows, columns) of patches.
    """

    def __init__(
        self,
        model: BridgeSTGForVideoGrounding,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        clips: Sequence[Sequence[torch.Tensor]],
        grids: torch.Tensor,
    ) -> None:
        self.model, self.mask = model, attention_mask
        self.prompt_length = input_ids.shape[1]
        positions, self.position = model.position_ids(input_ids, attention_mask, grids)
        (self.prompt_states,), self.cache = model.read_prompt(
            input_ids,
            clips,
            all_states=False,
            position_ids=positions,
            attention_mask=attention_mask,
            use_cache=True,
        )

    def _step(
        self, ids: torch.Tensor, real: torch.Tensor, visible: torch.Tensor, *, all_states: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Run `ids` `[B, n]` (where `real`, else padding) seeing `visible` `[B, cached]`; advances the positions."""
        steps = real.long().cumsum(-1)
        positions = self.position[:, None] + steps - real.long()
        self.position = self.position + steps[:, -1]
        states, self.cache = self.model.run_language_model(
            self.model.embed_text(ids),
            all_states=all_states,
            position_ids=positions.expand(3, -1, -1),
            attention_mask=torch.cat([visible, real.long()], dim=1),
            past_key_values=self.cache,
            use_cache=True,
        )
        return states

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, V]` of the last position; an answer holds no bridging tokens."""
        config = self.model.config
        logits = self.model.backbone.lm_head(states[:, -1])
        first = config.bridge_token_id
        logits[:, first : first + config.bridge_tokens] = -torch.inf
        return logits

    def generate(self, tokenizer: Any) -> list[str]:
        end, pad = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.pad_token_id
        logits = self._logits(self.prompt_states)
        running = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        generated = []
        for _ in range(self.model.config.max_answer_tokens):
            ids = torch.where(running, logits.argmax(-1), pad)
            generated.append(ids)
            states = self._step(ids[:, None], running[:, None], self.mask)[-1]
            self.mask = torch.cat([self.mask, running[:, None].long()], dim=1)
            running = running & (ids != end)
            if not bool(running.any()):
                break
            logits = self._logits(states)
        return [t.strip() for t in tokenizer.batch_decode(torch.stack(generated, 1), skip_special_tokens=True)]

    def bridge(self, answer_visible: torch.Tensor) -> BridgeQueries:
        """STSB on the states of the bridging tokens, which see the answer where `answer_visible` `[B]`."""
        config = self.model.config
        assert config.bridge_token_id is not None
        ids = torch.arange(config.bridge_tokens, device=self.mask.device) + config.bridge_token_id
        ids = ids.expand(len(self.mask), -1)
        visible = self.mask.clone()
        visible[:, self.prompt_length :] *= answer_visible[:, None].long()
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        return self.model.bridge_queries(self._step(ids, everywhere, visible, all_states=True), everywhere)


class SpatialPass:
    """The spatial half for clips of one frame size: memory and queries fixed, frames chosen per call.

    Args:
        model: the model.
        queries: of these clips.
        memory: `[B, G, N, C]`.
        visual: where it came from.
        times: `[B, T]`, seconds.
        lengths: frames of each clip.
    """

    def __init__(
        self,
        model: BridgeSTGForVideoGrounding,
        queries: BridgeQueries,
        memory: torch.Tensor,
        visual: VisualTokens,
        times: torch.Tensor,
        lengths: Sequence[int],
    ) -> None:
        self.model, self.queries, self.memory, self.times = model, queries, memory, times
        self.lengths = lengths
        self.centres = model.memory_centres(visual)
        scale = round((len(visual.centres) / len(self.centres)) ** 0.5)
        self.grid = (visual.grid[0] // scale, visual.grid[1] // scale)

    def _localise(self, frames: torch.Tensor) -> Any:
        return self.model.localise(self.queries, self.memory, self.centres, frames.to(self.memory.device), self.times)

    def presence(self) -> tuple[list[np.ndarray], torch.Tensor]:
        """Presence `[T]` by each clip's best hypothesis (highest mean presence), and which one it is `[B]`."""
        frames = torch.arange(max(self.lengths)).expand(len(self.memory), -1)
        real = frames < torch.tensor(self.lengths)[:, None]
        presence = self._localise(frames.where(real, -1)).tubes.presence[-1].float().sigmoid()  # [B, T, M]
        real = real.to(presence.device)[..., None]
        best = ((presence * real).sum(1) / real.sum(1)).argmax(-1)
        chosen = presence.gather(2, best[:, None, None].expand(-1, frames.shape[1], 1)).squeeze(-1).cpu().numpy()
        return [curve[:length] for curve, length in zip(chosen, self.lengths, strict=True)], best

    def boxes(self, chosen: Sequence[np.ndarray], best: torch.Tensor) -> tuple[list[np.ndarray], list[Any]]:
        """xyxy boxes in [0, 1] and kept tokens at the chosen frames of every clip."""
        width = max(len(frames) for frames in chosen)
        index = torch.full((len(chosen), width), -1)
        for row, frames in zip(index, chosen, strict=True):
            row[: len(frames)] = torch.from_numpy(frames)
        located = self._localise(index)
        rows = torch.arange(len(chosen), device=best.device)
        boxes = cxcywh_to_xyxy(located.tubes.boxes[-1][rows, :, best].float()).clamp(0, 1).cpu().numpy()  # [B, S, 4]
        kept: list[Any] = [[] for _ in chosen]
        if located.kept_index is not None:
            place = ((self.centres * torch.tensor(self.grid[::-1], device=self.centres.device)).long()).cpu().numpy()
            row_major = place[:, 1] * self.grid[1] + place[:, 0]
            tokens, scores = located.kept_index.cpu().numpy(), located.kept_score.float().cpu().numpy()
            for i, frames in enumerate(chosen):
                for s in range(len(frames)):
                    places = row_major[tokens[i, s]]
                    order = places.argsort()
                    kept[i].append((places[order], scores[i, s][order]))
        return [boxes[i, : len(frames)] for i, frames in enumerate(chosen)], kept
