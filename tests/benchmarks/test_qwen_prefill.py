"""Pruning the video tokens of stock models by the code of docs/prune_tokens.md."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks.studies import prefill

PAGE = Path(__file__).parents[2] / "docs" / "prune_tokens.md"
SECTION = PAGE.read_text().split("## In a stock Qwen2.5-VL or Qwen3-VL")[1]
RECIPE, USE = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
FAMILIES = ["qwen2_5_vl", "qwen3_vl"]
TEXTS, ROWS = ("input_ids", "attention_mask", "mm_token_type_ids"), ("pixel_values_videos", "video_grid_thw")
PAGE_NAMES: dict[str, Any] = {}
exec(RECIPE, PAGE_NAMES)
prune_visual_tokens = PAGE_NAMES["prune_visual_tokens"]


def batch(*prompts):
    """The prompts in one batch, padded on the left."""
    longest = max(one["input_ids"].shape[1] for one in prompts)
    texts = {k: torch.cat([F.pad(p[k], (longest - p[k].shape[1], 0)) for p in prompts]) for k in TEXTS}
    rows = {k: torch.cat([p[k] for p in prompts]) for k in (*ROWS, "second_per_grid_ts") if k in prompts[0]}
    return texts | rows


@pytest.fixture(scope="module", params=FAMILIES)
def stock(request):
    """A stock model and two prompts of different length, with videos of different size."""
    family = request.param
    prompts = [prefill.prompt(3, 4, 6, family), prefill.prompt(2, 3, 4, family, seed=2)]
    return prefill.stock_model(width=64, layers=3, family=family), prompts


def language_inputs(model, inputs, keep):
    """What the LLM reads."""
    seen = {}
    with torch.inference_mode():
        if keep is None:
            hook = model.model.language_model.register_forward_pre_hook(
                lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
            )
            model(**inputs)
        else:
            with prune_visual_tokens(model, inputs["input_ids"], keep):
                hook = model.model.language_model.register_forward_pre_hook(
                    lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
                )
                model(**inputs)
        hook.remove()
    return seen


def written(model, inputs, keep, **options):
    """What `generate` writes after pruning, and the logits of each step."""
    with prune_visual_tokens(model, inputs["input_ids"], keep):
        output = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
        )
    return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, 1)


def test_the_page_shows_the_code_of_the_benchmark_and_its_example_runs():
    assert inspect.getsource(prefill.prune_visual_tokens) in RECIPE
    names = dict(PAGE_NAMES)
    exec(USE, names)
    assert names["answer"].shape == (1, names["inputs"]["input_ids"].shape[1] + 5)


def test_what_stays_is_the_best_of_each_row_and_keeps_position_and_order(stock):
    model, prompts = stock
    inputs = batch(*prompts)
    whole, kept = language_inputs(model, inputs, None), language_inputs(model, inputs, 0.25)
    for row, one in enumerate(prompts):
        real = inputs["attention_mask"][row].bool()
        video = (inputs["input_ids"][row] == 1001) & real
        states = whole["inputs_embeds"][row]
        question = F.normalize(states[-10:], dim=-1)
        score = (F.normalize(states, dim=-1) @ question.T).amax(1).masked_fill(~video, -2.0)
        best = score.topk(round(0.25 * int((one["input_ids"] == 1001).sum()))).indices
        place = torch.cat([best, (real & ~video).nonzero().flatten()]).sort().values
        mask = kept["attention_mask"][row].bool()
        assert torch.equal(kept["inputs_embeds"][row][mask], states[place])
        assert torch.equal(kept["position_ids"][:, row][:, mask], whole["position_ids"][:, row][:, place])
        assert mask[-len(place) :].all() and not mask[: -len(place)].any()


def test_deepstack_planes_lose_what_the_prompt_loses():
    model = prefill.stock_model(width=64, layers=3, family="qwen3_vl")
    inputs = batch(prefill.prompt(3, 4, 6, "qwen3_vl"), prefill.prompt(2, 3, 4, "qwen3_vl", seed=2))
    whole, kept = language_inputs(model, inputs, None), language_inputs(model, inputs, 0.25)
    before, after = (seen["inputs_embeds"][seen["visual_pos_masks"]] for seen in (whole, kept))
    place = [int((before == row).all(-1).nonzero()[0]) for row in after]
    assert len(after) == 18 + 6
    for plane, pruned in zip(whole["deepstack_visual_embeds"], kept["deepstack_visual_embeds"], strict=True):
        assert torch.equal(pruned, plane[place])


def test_keeping_everything_is_the_stock_model(stock):
    model, prompts = stock
    for inputs in (*prompts, batch(*prompts)):
        with torch.inference_mode():
            expected = model(**inputs).logits
            with prune_visual_tokens(model, inputs["input_ids"], 1.0):
                assert torch.equal(model(**inputs).logits, expected)
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert torch.equal(written(model, inputs, 1.0)[0], output[:, inputs["input_ids"].shape[1] :])


def test_a_batch_is_written_as_its_prompts_are_alone(stock):
    model, prompts = stock
    alone = [written(model, one, 0.25) for one in prompts]
    together, logits = written(model, batch(*prompts), 0.25)
    assert torch.equal(together, torch.cat([tokens for tokens, _ in alone]))
    torch.testing.assert_close(logits, torch.cat([values for _, values in alone]), atol=1e-5, rtol=1e-5)
    beams = [written(model, one, 0.25, num_beams=2)[0] for one in prompts]
    assert torch.equal(written(model, batch(*prompts), 0.25, num_beams=2)[0], torch.cat(beams))


def test_a_cache_changes_nothing(stock):
    model, prompts = stock
    cached, plain = (written(model, batch(*prompts), 0.25, use_cache=use) for use in (True, False))
    assert torch.equal(cached[0], plain[0])
    torch.testing.assert_close(cached[1], plain[1], atol=1e-5, rtol=1e-5)
    everything = written(model, batch(*prompts), 1.0)[1]
    assert not torch.allclose(cached[1], everything, atol=1e-3)  # or nothing was pruned
