"""Pruning the visual tokens of a stock Qwen2.5-VL before its LLM."""

from __future__ import annotations

import pytest
import torch

from benchmarks.studies.prefill import answer, prompt, prune_visual_tokens, stock_model


@pytest.fixture(scope="module")
def stock():
    return stock_model(width=64, layers=2), prompt(groups=3, rows=4, columns=6)


def language_inputs(model, inputs, keep):
    """Embeddings and positions that the LLM reads."""
    seen = {}
    language = model.model.language_model
    with prune_visual_tokens(model, inputs["input_ids"], keep) if keep else torch.inference_mode():
        hook = language.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
        with torch.inference_mode():
            model(**inputs, use_cache=True, logits_to_keep=1)
        hook.remove()
    return seen["inputs_embeds"][0], seen["position_ids"][:, 0]


def test_what_stays_keeps_its_position_and_order(stock):
    model, inputs = stock
    whole, positions = language_inputs(model, inputs, None)
    kept, kept_positions = language_inputs(model, inputs, 0.25)
    assert len(kept) == len(whole) - 72 + 18
    place = [int((whole == row).all(-1).nonzero()[0]) for row in kept]
    assert place == sorted(set(place))
    assert torch.equal(kept_positions, positions[:, place])
    visual = inputs["input_ids"][0] == 1001
    assert set((~visual).nonzero().flatten().tolist()) <= set(place)
    question = torch.nn.functional.normalize(whole[-10:], dim=-1)
    score = (torch.nn.functional.normalize(whole[visual], dim=-1) @ question.T).amax(1)
    best = visual.nonzero().flatten()[score.topk(18).indices]
    assert set(best.tolist()) == {i for i in place if visual[i]}


def test_keeping_everything_is_the_stock_model(stock):
    model, inputs = stock
    stock_answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert torch.equal(answer(model, inputs, 1.0, 6), stock_answer)


def test_decoding_after_pruning_equals_one_forward_without_a_cache(stock):
    model, inputs = stock
    tokens = answer(model, inputs, 0.25, 4)
    embeds, positions = language_inputs(model, inputs, 0.25)
    last = int(inputs["input_ids"].shape[1] + model.model.rope_deltas)
    after = torch.arange(last, last + 3).expand(3, -1)
    with torch.inference_mode():
        more = model.get_input_embeddings()(tokens[:-1])
        states = model.model.language_model(
            inputs_embeds=torch.cat([embeds, more])[None], position_ids=torch.cat([positions, after], 1)[:, None]
        ).last_hidden_state
        assert torch.equal(model.lm_head(states)[0, -4:].argmax(-1), tokens)
