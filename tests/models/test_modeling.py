"""The network: what each part may see, positions, caching, switches, saving."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from bridge_stg.models import BridgeSTGConfig, BridgeSTGForVideoGrounding, BridgeSTGProcessor
from bridge_stg.models.backbones import FAMILIES


def test_output_shapes(make_model, batch):
    inputs, answer = batch
    model = make_model().train()
    output = model(**inputs)
    assert output.boxes.shape == (3, 2, 3, 4, 4)
    assert output.presence.shape == (3, 2, 3, 4)
    assert output.relevance.shape == output.contrast.shape == (2, 8)
    assert output.token_scores.shape == (2, 3, 64)
    assert len(output.answer_targets) == int(answer.sum())


def test_every_parameter_but_the_deepest_unused_ones_gets_a_gradient(make_model, batch):
    inputs, _ = batch
    model = make_model().train()
    output = model(**inputs)
    names = ("boxes", "presence", "relevance", "contrast", "token_scores", "answer_logits")
    terms = [getattr(output, name) for name in names]
    sum(term.float().pow(2).mean() for term in terms).backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    # The last layer of a zero-initialised box head blocks the layers below it at the very first step.
    assert all("box_heads" in name for name in silent), silent


def test_the_video_is_seen_after_the_sentence_only(make_model, processor, clips):
    model = make_model()
    frames, times = clips[0].render(), (np.arange(8) / 4).tolist()

    def states(sentence, video):
        features = processor([video], [times], [sentence], ["From 0.5 s to 1.2 s."], training=True)
        features.pop("answer_tokens")
        visual = model.encode_video(features["pixel_values"], features["video_grid_thw"])
        positions, _ = model.position_ids(features["input_ids"], features["attention_mask"], visual.grid)
        embeds = model.embed_prompt(features["input_ids"], visual.merged)
        hidden, _ = model.run_language_model(embeds, position_ids=positions, attention_mask=None, use_cache=False)
        return model.group_states(features["input_ids"], hidden[-1], visual)[0]

    red, blue = states("the red circle", frames), states("the blue circle", frames)
    assert not torch.allclose(red, blue)
    later = frames.copy()
    later[6:] = 0
    changed = (states("the red circle", later) - red).abs().amax(dim=(0, 2, 3)) > 1e-5
    assert changed.tolist() == [False, False, False, True]


def test_positions_treat_every_group_as_a_visual_block(make_model, processor):
    model = make_model()
    ids = torch.tensor([processor.tokenizer(processor.prompt("red", [0.1, 0.6], 4))["input_ids"]])
    positions, following = model.position_ids(ids, torch.ones_like(ids), (4, 4))
    # im_start user \n red \n 0.1 vision_start = 0..6, the 2 x 2 group starts at 7 and text goes on at 9.
    assert positions[:, 0, 7:11].tolist() == [[7, 7, 7, 7], [7, 7, 8, 8], [7, 8, 7, 8]]
    assert positions[:, 0, 11].tolist() == [9, 9, 9]
    assert positions[:, 0, 14:18].tolist() == [[12, 12, 12, 12], [12, 12, 13, 13], [12, 13, 12, 13]]
    assert following.tolist() == [int(positions[0, 0, -1]) + 1]


def test_padding_on_either_side_does_not_move_positions(make_model, processor):
    model = make_model()
    ids = torch.tensor([processor.tokenizer(processor.prompt("red", [0.1], 4))["input_ids"]])
    plain, following = model.position_ids(ids, torch.ones_like(ids), (4, 4))
    pad = torch.full((1, 3), processor.tokenizer.pad_token_id)
    for parts in ([pad, ids], [ids, pad]):
        padded = torch.cat(parts, dim=1)
        mask = torch.cat([torch.zeros_like(p) if p is pad else torch.ones_like(p) for p in parts], dim=1)
        positions, after = model.position_ids(padded, mask, (4, 4))
        torch.testing.assert_close(positions[:, mask.bool()], plain[:, 0])
        assert after.tolist() == following.tolist()


def test_batched_vision_attention_equals_the_stock_one(make_model, batch):
    model = make_model()
    inputs, _ = batch
    stock = Qwen2_5_VLForConditionalGeneration(model.config.backbone_config).eval()
    stock.load_state_dict(model.backbone.state_dict())
    expected = stock.model.visual(inputs["pixel_values"], grid_thw=inputs["video_grid_thw"]).pooler_output
    visual = model.encode_video(inputs["pixel_values"], inputs["video_grid_thw"])
    torch.testing.assert_close(visual.merged.flatten(0, 2), expected, atol=1e-5, rtol=1e-5)


def test_patches_come_back_in_place_from_windowed_attention(make_model, processor):
    """Tokens of a window grid that does not divide the frame: merging the restored patches gives the merged tokens."""
    model = make_model()
    vision = model.config.backbone_config.vision_config
    vision.window_size = 48  # windows of 3 x 3 merged tokens
    visual_tower = model.backbone.model.visual
    visual_tower.window_size = 48
    visual_tower.fullatt_block_indexes = [1]
    pixels, grid = processor.pixel_values(torch.randint(0, 255, (4, 64, 64, 3), dtype=torch.uint8))
    assert FAMILIES["qwen2_5_vl"].patch_order(2, 8, 8, vision) is not None
    visual = model.encode_video(pixels, grid)
    again = visual_tower.merger(visual.patches.reshape(-1, visual.patches.shape[-1]))
    torch.testing.assert_close(again, visual.merged.reshape(-1, visual.merged.shape[-1]), atol=1e-5, rtol=1e-5)


def test_clips_of_different_grids_are_refused(make_model, batch):
    inputs, _ = batch
    grid = inputs["video_grid_thw"].clone()
    grid[1, 1:] = torch.tensor([4, 16])
    with pytest.raises(ValueError, match="must share one grid"):
        make_model().encode_video(inputs["pixel_values"], grid)


def test_hidden_answers_do_not_reach_the_boxes(make_model, batch):
    inputs, answer = batch
    model = make_model()
    times = answer & (inputs["input_ids"] != model.processor.tokenizer.eos_token_id)
    red = model.processor.tokenizer.convert_tokens_to_ids("red")
    changed = dict(inputs, input_ids=torch.where(times, red, inputs["input_ids"]))
    for hidden in (answer, None):
        with torch.no_grad():
            a = model(**inputs, hidden_answer=hidden).boxes
            b = model(**changed, hidden_answer=hidden).boxes
        assert torch.allclose(a, b, atol=1e-6) == (hidden is not None)


def test_prediction_on_the_cache_equals_one_full_forward(make_model, processor, clips, monkeypatch):
    """The generated answer, teacher-forced in one pass, gives the presence that the cached steps gave."""
    model = make_model()
    frames, times = [clip.render() for clip in clips], [(np.arange(8) / 4).tolist()] * 2
    sentences = ["the red circle that moves left", "what moves up?"]
    model.config.max_answer_tokens = 5
    model.config.dense_alignment = False
    monkeypatch.setattr("bridge_stg.models.grounding.read_answer", lambda text, times, duration: (0.0, 1.0))
    predictions = model.predict(frames, times, sentences, durations=[2.0, 2.0])
    for i in range(2):
        features = processor([frames[i]], [times[i]], [sentences[i]], [""], training=True)
        ids = features["input_ids"]
        cut = int((features["answer_tokens"][0]).float().argmax())
        with torch.no_grad():
            words = _greedy(model, features, ids[:, :cut], 5)
            full = torch.cat([ids[:, :cut], words, ids[:, -4:]], dim=1)
            output = model(
                full,
                torch.ones_like(full),
                features["pixel_values"],
                features["video_grid_thw"],
                features["frame_times"],
                torch.arange(8)[None],
            )
        presence = output.presence[-1, 0].sigmoid()
        best = presence.mean(0).argmax()
        np.testing.assert_allclose(predictions[i].presence, presence[:, best].numpy(), atol=2e-4)
        np.testing.assert_array_equal(predictions[i].frames, np.arange(4))


def _greedy(model, features, prompt, steps):
    """Greedy decoding without a cache."""
    visual = model.encode_video(features["pixel_values"], features["video_grid_thw"])
    ids = prompt
    for _ in range(steps):
        positions, _ = model.position_ids(ids, torch.ones_like(ids), visual.grid)
        embeds = model.embed_prompt(ids, visual.merged)
        hidden, _ = model.run_language_model(embeds, position_ids=positions, attention_mask=None, use_cache=False)
        ids = torch.cat([ids, model.backbone.lm_head(hidden[-1][:, -1]).argmax(-1, keepdim=True)], dim=1)
    return ids[:, prompt.shape[1] :]


@pytest.mark.parametrize(
    "switch",
    [
        {"semantic_bridge": False},
        {"interactive_queries": "last"},
        {"memory_features": "vision"},
        {"memory_features": "merged"},
        {"pruning": False},
        {"gate": False},
        {"reference_points": "learned"},
        {"frame_contrast": False},
        {"dense_alignment": False},
        {"bridge_layers": 2},
    ],
)
def test_every_switch_trains_and_grounds(make_model, batch, clips, switch):
    inputs, _ = batch
    model = make_model(**switch).train()
    output = model(**inputs)
    assert (output.relevance is None) == (switch.get("dense_alignment") is False)
    assert (output.contrast is None) == (switch.get("frame_contrast") is False)
    assert (output.token_scores is None) == (switch.get("pruning") is False)
    output.boxes.sum().backward()
    (prediction,) = model.predict(
        [clips[0].render()], [(np.arange(8) / 4).tolist()], ["what moves up?"], durations=[2.0]
    )
    assert 0 <= prediction.interval[0] < prediction.interval[1] <= 2.0
    assert len(prediction.boxes) == len(prediction.frames) > 0


def test_without_the_bridge_the_boxes_do_not_read_the_sentence(make_model, processor, clips):
    frames, times = clips[0].render(), (np.arange(8) / 4).tolist()
    options = {"memory_features": "vision", "interval_source": "presence", "dense_alignment": False}
    blind, reading = make_model(semantic_bridge=False, **options), make_model(**options)
    for model, same in ((blind, True), (reading, False)):
        a, b = (
            model.predict([frames], [times], [s], durations=[2.0])[0].presence
            for s in ("the red circle", "the blue star")
        )
        assert np.allclose(a, b, atol=1e-6) == same


def test_save_and_load_round_trip(make_model, batch, tmp_path):
    inputs, _ = batch
    model = make_model(keep=0.5)
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == ["model.safetensors"]
    assert not list(tmp_path.glob("*.bin"))
    again = BridgeSTGForVideoGrounding.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).boxes, model(**inputs).boxes)
    assert type(AutoConfig.from_pretrained(tmp_path)) is BridgeSTGConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is BridgeSTGForVideoGrounding
    assert type(AutoProcessor.from_pretrained(tmp_path)) is BridgeSTGProcessor
    assert again.processor.patch_size == 8


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("keep", 0.0, "keep must be a number > 0 and <= 1, got 0.0"),
        ("keep", 1.5, r"got 1.5"),
        ("memory_features", "both", "memory_features must be one of"),
        ("interval_source", "guess", "got 'guess'"),
        ("bridge_layers", 9, r"bridge_layers must be in 1\.\.3"),
    ],
)
def test_choices_out_of_range_are_named(processor, field, value, message):
    from bridge_stg.models.tiny import tiny_config

    with pytest.raises(ValueError, match=message):
        tiny_config(processor, **{field: value})


def test_keep_is_a_share_also_as_an_integer(make_model):
    assert make_model(keep=1).pruner.keep_count(64) == 64
