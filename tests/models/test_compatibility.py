"""What users of stock transformers and torch do with a model, see docs/compatibility_model.md."""

import copy
import functools
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel, Trainer, TrainingArguments

from bridge_stg.errors import ModelError
from bridge_stg.models import BridgeSTGConfig, BridgeSTGForVideoGrounding, BridgeSTGOutput, shipped_model
from bridge_stg.models.losses import GroundingTargets, LossWeights, grounding_loss, grounding_losses

TIMES = [(np.arange(8) / 4).tolist()]


def ground(model, clips):
    return model.predict([clips[0].render()], TIMES, ["what moves up?"], durations=[2.0])[0]


def make_targets(batch=2, spatial=3, frames=8):
    return {
        "boxes": torch.full((batch, spatial, 4), 0.5),
        "has_box": torch.ones(batch, spatial, dtype=torch.bool),
        "present": torch.ones(batch, spatial, dtype=torch.bool),
        "has_presence": torch.ones(batch, spatial, dtype=torch.bool),
        "inside": (torch.arange(frames) < 4).expand(batch, -1),
        "has_interval": torch.ones(batch, dtype=torch.bool),
    }


@pytest.fixture
def saved(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    model.processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# Weights that a checkpoint lacks ---------------------------------------------------------------------------------


def fill_memory_with_junk():
    del [torch.full((n,), 1e30) for n in (96 * 96, 96 * 256, 64 * 96, 64 * 64, 192, 96, 64) for _ in range(100)][:]


@pytest.mark.parametrize(
    "other",
    [
        {"decoder_dim": 64},
        {"semantic_bridge": False},
        {"reference_points": "learned"},
        {"memory_features": "merged"},
        {"separate_bridge_embeddings": True},
        {"bridge_layers": 2},
    ],
    ids=str,
)
def test_missing_and_mismatched_weights_are_drawn_as_those_of_a_new_model(other):
    fill_memory_with_junk()
    torch.manual_seed(0)
    loaded, info = BridgeSTGForVideoGrounding.from_pretrained(
        shipped_model(), output_loading_info=True, ignore_mismatched_sizes=True, **other
    )
    new = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    assert new or other == {"bridge_layers": 2}
    fresh, found = (dict(m.named_parameters()) for m in (BridgeSTGForVideoGrounding(loaded.config), loaded))
    for name in new:
        a, b = found[name].detach(), fresh[name].detach()
        if b.numel() == 1 or b.std() == 0:
            assert torch.equal(a, b) or (b.numel() == 1 and a.abs() <= 1), name
        else:
            assert a.std().item() == pytest.approx(b.std().item(), rel=0.5 if b.numel() < 400 else 0.1), name


def test_loaded_weights_are_not_drawn_again(saved, make_model):
    loaded = BridgeSTGForVideoGrounding.from_pretrained(saved)
    expected = make_model().state_dict()
    assert all(torch.equal(p, expected[name]) for name, p in loaded.state_dict().items())


def test_every_weight_of_a_model_made_without_memory_can_be_drawn(make_model):
    """`torch.device("meta")`, then `to_empty` and `init_weights`, as FSDP and large-model loaders do."""
    real = make_model(semantic_bridge=False, separate_bridge_embeddings=True)
    with torch.device("meta"):
        model = BridgeSTGForVideoGrounding(real.config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
            p._is_hf_initialized = False
        for module in model.modules():
            module._is_hf_initialized = False
    model.init_weights()
    assert not [name for name, p in model.named_parameters() if not p.isfinite().all()]


# Dtypes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "switch", [{}, {"pruning": False}, {"reference_points": "learned"}, {"semantic_bridge": False}]
)
def test_a_model_of_any_dtype_trains_and_grounds(make_model, batch, clips, dtype, switch):
    model = make_model(**switch).to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    found = ground(model, clips)
    assert found.interval[0] < found.interval[1] and np.isfinite(found.boxes).all()
    output = model.train()(**batch[0], targets=make_targets())
    assert output.boxes.dtype == torch.promote_types(dtype, torch.float32)
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_backbone_loaded_in_half_precision_keeps_the_spatial_half_in_fp32(saved, clips, dtype):
    model = BridgeSTGForVideoGrounding.from_pretrained(saved, dtype=dtype)
    assert model.backbone.dtype == dtype and model.spatial_dtype == torch.float32
    assert np.isfinite(ground(model, clips).boxes).all()


# Copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_pickles_and_copies_ground_alike(make_model, clips, used):
    """A model that has run holds hooks of transformers, which are closures."""
    model = make_model()
    found = ground(model, clips) if used else None
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    others = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model), torch.load(buffer, weights_only=False)]
    found = found or ground(model, clips)
    for other in others:
        again = ground(other, clips)
        assert np.array_equal(again.presence, found.presence) and np.array_equal(again.boxes, found.boxes)
        assert other.backbone is not model.backbone
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert np.array_equal(ground(model, clips).boxes, found.boxes)  # the original still records


# Embeddings ----------------------------------------------------------------------------------------------------


def vocabulary(model):
    config = model.config.backbone_config.text_config
    return model.get_input_embeddings().num_embeddings, model.get_output_embeddings().out_features, config.vocab_size


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_embeddings_grow_and_survive_saving(load_backbone, tmp_path, family):
    model = load_backbone(family)
    rows = vocabulary(model)[0]
    tied = family == "qwen3_vl"
    old = model.get_input_embeddings().weight.detach().clone()
    grown = model.resize_token_embeddings(rows + 3, pad_to_multiple_of=8)
    more = -(-(rows + 3) // 8) * 8
    assert vocabulary(model) == (more, more, more) and grown is model.get_input_embeddings()
    assert torch.equal(grown.weight[:rows], old) and grown.weight.isfinite().all()
    assert (grown.weight is model.get_output_embeddings().weight) == tied
    model.save_pretrained(tmp_path)  # whole: the checkpoint it came from has no such rows
    again = BridgeSTGForVideoGrounding.from_pretrained(tmp_path)
    assert vocabulary(again) == (more, more, more)
    assert torch.equal(again.get_input_embeddings().weight, grown.weight)
    assert model.resize_token_embeddings() is model.get_input_embeddings()


@pytest.mark.parametrize("rows", [0, -3, 2.5, "many", True, 10])
def test_a_resize_that_cannot_be_changes_nothing(make_model, rows):
    model = make_model()
    before, embedding = vocabulary(model), model.get_input_embeddings()
    with pytest.raises(ValueError, match=r"new_num_tokens must be .*, got "):
        model.resize_token_embeddings(rows)
    assert vocabulary(model) == before and model.get_input_embeddings() is embedding


def test_a_resize_that_fails_half_way_is_undone(make_model, monkeypatch):
    model = make_model()
    before, parts = vocabulary(model), (model.get_input_embeddings(), model.get_output_embeddings())

    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(type(model.backbone), "_get_resized_lm_head", fail)
    with pytest.raises(MemoryError):
        model.resize_token_embeddings(before[0] + 8)
    assert vocabulary(model) == before
    assert (model.get_input_embeddings(), model.get_output_embeddings()) == parts


def test_embeddings_can_be_replaced(make_model, batch):
    model = make_model()
    rows, width = model.get_input_embeddings().weight.shape
    embedding, head = nn.Embedding(rows, width), nn.Linear(width, rows, bias=False)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is embedding and model.get_output_embeddings() is head
    model(**batch[0]).answer_logits.sum().backward()
    assert embedding.weight.grad.abs().sum() > 0 and head.weight.grad.abs().sum() > 0


def test_embeddings_under_adapters_are_refused(load_backbone):
    pytest.importorskip("peft")
    model = load_backbone("qwen2_5_vl")
    model.add_lora(rank=2)
    with pytest.raises(ModelError, match="merge_lora"):
        model.resize_token_embeddings(400)


# Outputs -------------------------------------------------------------------------------------------------------


def test_loss_is_the_weighted_sum_of_the_terms_that_have_labels(make_model, batch):
    inputs, _ = batch
    model, targets = make_model(), make_targets()
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    output = model(**inputs, targets=targets)
    terms = grounding_losses(output, GroundingTargets(**targets), LossWeights(), match_one=False)
    expected = sum(getattr(LossWeights(), name) * value for name, value in terms.items())
    torch.testing.assert_close(output.loss, expected)
    answer = nn.functional.cross_entropy(output.answer_logits, output.answer_targets)
    torch.testing.assert_close(model(**inputs).loss, answer)
    torch.testing.assert_close(model(**unlabelled, targets=targets).loss, expected - answer)
    assert model(**unlabelled).loss is None
    assert model(**inputs, targets=targets, return_loss=False).loss is None
    assert model(**{**inputs, "labels": torch.full_like(inputs["labels"], -100)}).loss is None
    model.loss_function = functools.partial(grounding_loss, weights=LossWeights(language=2.0), match_one=True)
    torch.testing.assert_close(model(**inputs).loss, 2 * answer)


def test_the_tuple_holds_what_the_output_holds(make_model, batch):
    inputs, _ = batch
    model = make_model(attn_implementation="eager").eval()
    options = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        named = model(**inputs, **options)
        plain = model(**inputs, **options, return_dict=False)
    assert isinstance(named, BridgeSTGOutput) and type(plain) is tuple
    assert len(plain) == len(named) and plain[0] is not None
    assert all(torch.equal(x, y) for x, y in zip(flat(plain), flat(named.to_tuple()), strict=True))


def flat(values):
    return [x for v in values for x in (flat(v) if isinstance(v, tuple) else [v])]


def test_states_and_attentions_of_the_language_model(make_model, batch):
    inputs, _ = batch
    model = make_model(attn_implementation="eager").eval()
    rows, length = inputs["input_ids"].shape
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(rows, length, 128)] * 4
    assert [tuple(layer.shape) for layer in output.attentions] == [(rows, 4, length, length)] * 3
    torch.testing.assert_close(output.attentions[0].sum(-1)[0], torch.ones(4, length))
    output = model(**inputs)
    assert output.hidden_states is None and output.attentions is None
    model.config.output_hidden_states = True
    assert len(model(**inputs).hidden_states) == 4
    some = model(**inputs, output_hidden_states=[0, -1, 99]).hidden_states
    assert [state is None for state in some] == [False, True, True, False]
    assert make_model(attn_implementation="sdpa")(**inputs, output_attentions=True).attentions == ()


def test_prompts_that_do_not_fit_are_refused(make_model, batch):
    inputs, _ = batch
    model, ids = make_model(), inputs["input_ids"].clone()
    ids[0, -1] = 300
    with pytest.raises(ValueError, match=r"Every row of input_ids must hold the 4 bridging tokens, got \[3, 4\]"):
        model(**{**inputs, "input_ids": ids})
    ids = inputs["input_ids"].clone()
    ids[0, (ids[0] == model.config.backbone_config.video_token_id).nonzero()[0]] = 300
    with pytest.raises(ValueError, match="must hold a video token for each of 128 visual tokens, got 127"):
        model(**{**inputs, "input_ids": ids})


def test_eager_and_sdpa_agree(make_model, batch, clips):
    eager, sdpa = (make_model(attn_implementation=name) for name in ("eager", "sdpa"))
    with torch.no_grad():
        torch.testing.assert_close(eager(**batch[0]).boxes, sdpa(**batch[0]).boxes, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(ground(eager, clips).presence, ground(sdpa, clips).presence, atol=1e-5)


# Training ------------------------------------------------------------------------------------------------------


def test_the_stock_trainer_trains_it(make_model, batch, tmp_path):
    inputs, _ = batch
    model, targets = make_model().train(), make_targets()

    def collate(rows):
        return {**inputs, "targets": targets}

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        tmp_path,
        max_steps=4,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        label_names=["labels", "targets"],
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=[0] * 8, eval_dataset=[0] * 2, data_collator=collate)
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == 4 and found[-1] < found[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("spatial_decoder" in name for name in moved) and any("language_model" in name for name in moved)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        model.eval()(**inputs, targets=targets).loss.item(), abs=1e-3
    )


# Loading -------------------------------------------------------------------------------------------------------


def test_a_model_in_a_subfolder_brings_its_own_processor(saved, clips):
    expected = ground(BridgeSTGForVideoGrounding.from_pretrained(saved), clips)
    for model_class in (BridgeSTGForVideoGrounding, AutoModel):
        model = model_class.from_pretrained(saved.parent, subfolder=saved.name)
        assert np.array_equal(ground(model, clips).boxes, expected.boxes)


def test_configurations_go_round(make_model):
    config = make_model().config
    same = config.to_dict()
    assert BridgeSTGConfig.from_dict(same).to_dict() == same
    assert BridgeSTGConfig(**config.to_diff_dict()).to_dict() == same
    assert BridgeSTGConfig.from_dict(BridgeSTGConfig().to_dict()).to_dict() == BridgeSTGConfig().to_dict()
    assert copy.deepcopy(config).to_dict() == same
    assert config.get_text_config() is config.backbone_config.text_config
