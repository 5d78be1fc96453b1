"""Inference on a batch: the text pass on one KV cache, then the spatial pass; clips may differ in length and size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..modules.boxes import cxcywh_to_xyxy
from ..modules.semantic_bridge import BridgeQueries
from .modeling_bridge_stg import BridgeSTGModel
from .outputs import Localisation
from .processing_bridge_stg import rest_of_answer
from .visual_tokens import VisualTokens


def encode_clips(
    model: BridgeSTGModel, pixel_values: torch.Tensor, grid_thw: torch.Tensor
) -> list[tuple[list[int], VisualTokens]]:
    """Run the vision tower over clips of any sizes, those of one size together.

    Args:
        pixel_values, grid_thw: what `BridgeSTGProcessor` returned.

    Returns:
        For every frame size, the places in the batch of the clips that have it, and their tokens.
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


def tokens_by_clip(encoded: Sequence[tuple[list[int], VisualTokens]]) -> list[list[torch.Tensor]]:
    """`VisualTokens.tokens` of every clip, in the order of the batch that `encode_clips` was given."""
    found = {clip: visual.tokens(place) for members, visual in encoded for place, clip in enumerate(members)}
    return [found[clip] for clip in range(len(found))]


class CachedDecoding:
    """The text pass: prefill, greedy answer and bridging tokens on one KV cache; rows that end early are masked.

    Args:
        model: the model.
        input_ids, attention_mask: `[B, L]`, padded on the left.
        clips: `VisualTokens.tokens` of each clip.
        grids: int64 `[B, 2]`, (rows, columns) of patches.

    Attributes:
        mask: `[B, cached]`, 0 at what is padding in the cache.
        position: `[B]`, the next free position.
        unread: (tokens int64 `[B, n]`, bool `[B, n]` that is False at padding on the left): the end of the answer,
            which the cache does not hold yet; `bridge` runs it together with the bridging tokens.
    """

    def __init__(
        self,
        model: BridgeSTGModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        clips: Sequence[Sequence[torch.Tensor]],
        grids: torch.Tensor,
    ) -> None:
        self.model, self.mask = model, attention_mask
        self.prompt_length = input_ids.shape[1]
        self.unread = input_ids[:, :0], torch.zeros_like(input_ids[:, :0], dtype=torch.bool)
        positions, self.position = model.position_ids(input_ids, attention_mask, grids)
        (self.prompt_states,), output = model.read_prompt(
            input_ids,
            clips,
            all_states=False,
            position_ids=positions,
            attention_mask=attention_mask,
            use_cache=True,
        )
        self.cache = output.past_key_values

    def _step(
        self, ids: torch.Tensor, real: torch.Tensor, visible: torch.Tensor, *, all_states: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Run tokens through the LLM and advance cache and positions.

        Args:
            ids: int64 `[B, n]`.
            real: bool `[B, n]`, False at padding.
            visible: `[B, cached or cached + n]`, 0 at what the tokens must not see.
            all_states: see `run_language_model`.
        """
        steps = real.long().cumsum(-1)
        positions = self.position[:, None] + steps - real.long()
        self.position = self.position + steps[:, -1]
        visible = torch.cat([visible, real[:, visible.shape[1] - self.cache.get_seq_length() :].long()], dim=1)
        states, output = self.model.run_language_model(
            self.model.embed_text(ids),
            all_states=all_states,
            position_ids=positions.expand(3, -1, -1),
            attention_mask=visible,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = output.past_key_values
        return states

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits `[B, V]` of the last position, -inf for the bridging tokens, which no answer holds."""
        logits = self.model.backbone.lm_head(states[:, -1])
        bridge = self.model.bridge_token_ids
        logits[:, bridge.start : bridge.stop] = -torch.inf
        return logits

    def generate(self, tokenizer: Any) -> list[str]:
        """Generate greedy answers; one whose interval is complete is closed at once, and `unread` holds its closing."""
        end, pad = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.pad_token_id
        rows = range(len(self.mask))
        said: list[list[int]] = [[] for _ in rows]
        unread: list[list[int]] = [[] for _ in rows]
        states = self.prompt_states
        for _ in range(self.model.config.max_answer_tokens):
            chosen = self._logits(states).argmax(-1).tolist()
            for row in [row for row in rows if not unread[row]]:
                said[row].append(chosen[row])
                if chosen[row] == end:
                    unread[row] = [end]
                elif rest := rest_of_answer(tokenizer.decode(said[row], skip_special_tokens=True)):
                    closing = tokenizer(rest + "<|im_end|>")["input_ids"]
                    said[row] += closing
                    unread[row] = [chosen[row], *closing]
            if all(unread):
                break
            real = torch.tensor([[not unread[row]] for row in rows], device=self.mask.device)
            ids = torch.tensor([[pad if unread[row] else chosen[row]] for row in rows], device=self.mask.device)
            states = self._step(ids, real, self.mask)[-1]
            self.mask = torch.cat([self.mask, real.long()], dim=1)
        width = max(map(len, unread))
        padded = [[pad] * (width - len(row)) + row for row in unread]
        real_tokens = [[False] * (width - len(row)) + [True] * len(row) for row in unread]
        device = self.mask.device
        self.unread = torch.tensor(padded, device=device).long(), torch.tensor(real_tokens, device=device).bool()
        return [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]

    def bridge(self, answer_visible: torch.Tensor) -> BridgeQueries:
        """Run the bridging tokens and apply STSB; they see the answer where `answer_visible`, bool `[B]`, is True."""
        bridge = self.model.bridge_token_ids
        ids = torch.arange(bridge.start, bridge.stop, device=self.mask.device).expand(len(self.mask), -1)
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        unread, real = self.unread
        visible = torch.cat([self.mask, real.long()], dim=1)
        visible[:, self.prompt_length :] *= answer_visible[:, None].long()
        states = self._step(
            torch.cat([unread, ids], dim=1), torch.cat([real, everywhere], dim=1), visible, all_states=True
        )
        return self.model.bridge_queries(tuple(state[:, unread.shape[1] :] for state in states), everywhere)


class SpatialPass:
    """The spatial pass over clips of one frame size, on frames that each call chooses.

    Args:
        model: the model.
        queries: bridging queries of these clips.
        memory: `[B, G, N, C]`, see `BridgeSTGModel.visual_memory`.
        visual: the visual tokens that the memory was made of.
        times: `[B, T]`, seconds.
        lengths: number of frames of each clip.
    """

    def __init__(
        self,
        model: BridgeSTGModel,
        queries: BridgeQueries,
        memory: torch.Tensor,
        visual: VisualTokens,
        times: torch.Tensor,
        lengths: Sequence[int],
    ) -> None:
        self.model, self.queries, self.memory, self.times = model, queries, memory, times
        self.lengths = lengths
        self._located: tuple[torch.Tensor, Localisation] | None = None
        self.centres = model.memory_centres(visual.grid, visual.merged.device)
        scale = round((math.prod(visual.grid) / len(self.centres)) ** 0.5)
        self.grid = (visual.grid[0] // scale, visual.grid[1] // scale)

    def _localise(self, frames: torch.Tensor) -> Localisation:
        """Localise frames, or return the last result if they are the same again, as for presence and then boxes."""
        if self._located is None or not torch.equal(frames, self._located[0]):
            index = frames.to(self.memory.device)
            self._located = (
                frames,
                self.model.localise(self.queries, self.memory, self.centres, index, self.times),
            )
        return self._located[1]

    def presence(self) -> tuple[list[np.ndarray], torch.Tensor]:
        """Presence over each clip by its best hypothesis, the one with the highest mean presence.

        Returns:
            (B arrays `[T]` in [0, 1], int64 `[B]` numbers of the hypotheses).
        """
        frames = torch.arange(max(self.lengths)).expand(len(self.memory), -1)
        real = frames < torch.tensor(self.lengths)[:, None]
        presence = self._localise(frames.where(real, -1)).tubes.presence[-1].float().sigmoid()  # [B, T, M]
        real = real.to(presence.device)[..., None]
        best = ((presence * real).sum(1) / real.sum(1)).argmax(-1)
        chosen = presence.gather(2, best[:, None, None].expand(-1, frames.shape[1], 1)).squeeze(-1).cpu().numpy()
        return [curve[:length] for curve, length in zip(chosen, self.lengths, strict=True)], best

    def boxes(self, chosen: Sequence[np.ndarray], best: torch.Tensor) -> tuple[list[np.ndarray], list[Any]]:
        """Boxes and kept tokens at chosen frames of every clip.

        Args:
            chosen: positions of frames, an int64 array a clip.
            best: int64 `[B]`, the hypothesis of each clip.

        Returns:
            (B arrays `[n, 4]` xyxy in [0, 1], B lists of n pairs (row-major token index, score)).
        """
        width = max(len(frames) for frames in chosen)
        index = torch.full((len(chosen), width), -1)
        for row, frames in zip(index, chosen, strict=True):
            row[: len(frames)] = torch.from_numpy(frames)
        located = self._localise(index)
        rows = torch.arange(len(chosen), device=best.device)
        boxes = cxcywh_to_xyxy(located.tubes.boxes[-1][rows, :, best].float()).clamp(0, 1).cpu().numpy()  # [B, S, 4]
        kept: list[Any] = [[] for _ in chosen]
        if located.kept_index is not None and located.kept_score is not None:
            place = ((self.centres * torch.tensor(self.grid[::-1], device=self.centres.device)).long()).cpu().numpy()
            row_major = place[:, 1] * self.grid[1] + place[:, 0]
            tokens, scores = located.kept_index.cpu().numpy(), located.kept_score.float().cpu().numpy()
            for i, frames in enumerate(chosen):
                for s in range(len(frames)):
                    places = row_major[tokens[i, s]]
                    order = places.argsort()
                    kept[i].append((places[order], scores[i, s][order]))
        return [boxes[i, : len(frames)] for i, frames in enumerate(chosen)], kept
