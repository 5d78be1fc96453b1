"""The coupled baseline: its answer as text and back, its training, its decoding, and what the latency bench counts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import bench_tube_latency
from benchmarks.baselines.coupled import (
    CoupledForVideoGrounding,
    answer_limit,
    build_coupled,
    collate_coupled,
    parse_tube,
    training_answer,
    tube_text,
)
from benchmarks.harness import command
from benchmarks.harness.runner import Settings, _ring
from benchmarks.studies import coupled as coupled_comparison
from bridge_stg.data import SyntheticTubes, read_samples, write_split
from bridge_stg.evaluation import METRICS, evaluate
from bridge_stg.inference.dataset import predict_samples
from bridge_stg.models import load_model
from bridge_stg.models.loading import shipped_model
from bridge_stg.training import (
    LossWeights,
    Phase,
    SyntheticCurriculum,
    build_model,
    grounding_losses,
    load_config,
    train,
)

MIX = {"image": 1.0, "snippet": 1.0, "question": 1.0, "distractors": 1.0}


@pytest.fixture(scope="module")
def baseline():
    model, _ = build_coupled(load_config("tiny", ["seed=1"]))
    return model.eval()


def clips(count, frames=6):
    tubes = SyntheticTubes("val", seed=2, count=count, frame_count=frames, size=(64, 64))
    return [tubes[i] for i in range(count)]


def test_boxes_survive_the_text():
    boxes = np.sort(np.random.default_rng(0).random((5, 2, 2)), axis=1).reshape(5, 4)
    text = tube_text(boxes)
    assert text.count("\n") == 4 and text.split("\n")[0].count(",") == 3
    assert np.abs(parse_tube(f"From 1.0 s to 2.0 s.\n{text}", 5) - boxes).max() <= 0.0005 + 1e-9
    assert tube_text(np.array([[-0.2, 0.0, 1.0, 1.3]])) == "0,0,1000,1000"


def test_an_answer_survives_the_tiny_tokenizer(baseline):
    tokenizer = baseline.processor.tokenizer
    text = "From 3.0 s to 7.5 s.\n" + tube_text(np.array([[0.012, 0.3, 0.64, 1.0], [0.0, 0.305, 0.7, 0.999]]))
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    again = tokenizer.decode(ids)
    assert np.allclose(parse_tube(again, 2), [[0.012, 0.3, 0.64, 1.0], [0.0, 0.305, 0.7, 0.999]])
    assert len(ids) < answer_limit(tokenizer, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [[0, 0, 1, 1], [0, 0, 1, 1]]),
        ("From 1.0 s to 2.0 s.\n100,200,300,400", [[0.1, 0.2, 0.3, 0.4]] * 2),
        ("300,400,100,200\n1,2,3\n0,0,5000,1000\n7,7,7,7", [[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]]),
    ],
)
def test_there_is_always_a_box(text, expected):
    assert np.allclose(parse_tube(text, 2), expected)


def test_items_become_answers_with_all_their_labels():
    def item(mix):
        return SyntheticCurriculum([Phase(9, mix)], batch_size=1, images_per_clip=1, length=9)[0][0]

    clip = item({"single": 1.0})
    lines = training_answer(clip).split("\n")
    start, end = clip.interval
    assert lines[0] == clip.answer and len(lines) == 1 + end - start
    assert np.allclose(parse_tube(training_answer(clip), end - start), clip.boxes[start:end], atol=0.0006)
    assert training_answer(item({"image": 1.0})).count(",") == 3
    question = item({"question": 1.0})
    assert training_answer(question).split("\n")[0] == question.answer and training_answer(question).count("\n") == 2
    snippet = item({"snippet": 1.0})
    present = training_answer(replace(snippet, interval=(0, 2)))
    absent = training_answer(replace(snippet, interval=(0, 0)))
    assert present.count("\n") == 2 and "\n" not in absent and absent.startswith("From ")
    unknown = replace(clip, boxes=np.full_like(clip.boxes, np.nan))
    assert training_answer(unknown) == clip.answer


def test_it_learns_from_the_language_loss_alone():
    model, processor = build_coupled(load_config("tiny", ["seed=1"]))
    data = SyntheticCurriculum([Phase(1, {"single": 1.0})], batch_size=2, frame_size=(64, 64), length=2)
    batch = collate_coupled([data[0], data[1]], processor)
    assert (
        (batch["input_ids"] < model.config.bridge_token_id)
        .logical_or(batch["input_ids"] >= model.config.bridge_token_id + model.config.bridge_tokens)
        .all()
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    for _ in range(6):
        losses = grounding_losses(model(**batch.inputs), batch.targets, LossWeights(), match_one=False)
        assert list(losses) == ["language"]
        losses["language"].backward()
        if not seen:
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        seen.append(losses["language"].item())
    assert seen[-1] < 0.8 * seen[0]


def test_the_trainer_trains_saves_and_loads_it(tmp_path):
    settings = [f"data.phases=[{{steps: 2, mix: {MIX}}}]", "schedule.steps=2", "data.batch_size=2", "data.workers=0"]
    config = load_config("tiny", settings)
    trainer = train(config, tmp_path, tensorboard=False, build=build_coupled, collate=collate_coupled)
    again = CoupledForVideoGrounding.load(tmp_path)
    assert again.processor.bridge_tokens == 0
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_cached_answers_are_the_greedy_ones(baseline):
    from benchmarks.baselines.coupled import CoupledDecoding
    from bridge_stg.models.decoding import encode_clips

    processor, tokenizer = baseline.processor, baseline.processor.tokenizer
    given = clips(2)
    times = [[i / 4 for i in range(6)]] * 2
    inputs = processor([clip.render() for clip in given], times, [given[0].sentence, "what moves left?"])
    grids = inputs["video_grid_thw"]
    with torch.inference_mode():
        ((_, visual),) = encode_clips(baseline, inputs["pixel_values"], grids)
        tokens = [visual.tokens(0), visual.tokens(1)]
        decoding = CoupledDecoding(baseline, inputs["input_ids"], inputs["attention_mask"], tokens, grids[:, 1:])
        heads = ["From 0.0 s to 0.5 s.\n", "From 0.5 s to 1.0 s.\n"]
        found = {None: decoding.write(tokenizer, 12), "heads": decoding.write(tokenizer, 12, heads)}
        assert found[None] == decoding.write(tokenizer, 12)
        for key, answers in found.items():
            for row, answer in enumerate(answers):
                ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
                if key == "heads":
                    ids = torch.cat([ids, torch.tensor([tokenizer(heads[row])["input_ids"]])], dim=1)
                said = _uncached(baseline, ids, tokens[row], grids[row, 1:], 12)
                assert answer == tokenizer.decode(said, skip_special_tokens=True)


def _uncached(model, ids, tokens, grid, count):
    said = []
    end = model.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    first = model.config.bridge_token_id
    while len(said) < count and end not in said:
        mask = torch.ones_like(ids)
        positions, _ = model.position_ids(ids, mask, grid)
        (states,), _ = model.read_prompt(
            ids, [tokens], all_states=False, position_ids=positions, attention_mask=mask, use_cache=False
        )
        logits = model.backbone.lm_head(states[:, -1])
        logits[:, first : first + model.config.bridge_tokens] = -torch.inf
        said.append(int(logits.argmax(-1)))
        ids = torch.cat([ids, torch.tensor([[said[-1]]])], dim=1)
    return said


def test_predictions_are_scored_like_ours(baseline, tmp_path, monkeypatch):
    samples = read_samples(write_split(tmp_path, "test", 2, 3, frame_count=6, size=(64, 64)))
    truth = {sample.sentence: sample for sample in samples}

    def told(self, tokenizer, limit, heads=None):
        texts = []
        for sample in samples:
            start, end = sample.interval_frames
            tube = tube_text(np.array([sample.boxes[i] for i in range(start, end)]) / 64)
            texts.append(tube if heads else f"From {start / 4:.1f} s to {end / 4:.1f} s.\n{tube}")
        return texts

    monkeypatch.setattr("benchmarks.baselines.coupled.CoupledDecoding.write", told)
    assert len(truth) == 2
    row = evaluate(samples, predict_samples(baseline, samples)).summary["all"]
    assert row["m_tIoU"] == 1.0 and min(row["m_vIoU"], row["gt_vIoU"]) > 0.97
    monkeypatch.setattr("benchmarks.baselines.coupled.CoupledDecoding.write", lambda *_: ["left."] * 2)
    row = evaluate(samples, predict_samples(baseline, samples)).summary["all"]
    assert 0 < row["m_tIoU"] < 1 and 0 < row["gt_vIoU"] < 0.5


@pytest.mark.parametrize("text", [True, False])
def test_latency_begins_behind_the_prefill(text):
    model = bench_tube_latency.tiny_model(torch.device("cpu"))
    language, vision = model.backbone.model.language_model, model.backbone.model.visual
    lengths = []
    with torch.inference_mode():
        clip = bench_tube_latency.Clip(model, 8, seed=0)
        hooks = [
            language.register_forward_pre_hook(
                lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
            ),
            vision.register_forward_pre_hook(lambda *_: pytest.fail("the vision tower must not run again")),
        ]
        try:
            for _ in range(2):
                lengths.clear()
                boxes = bench_tube_latency.decoupled_tube(clip, text=text)
                # From 0.0 s to 2.0: five tokens, the last of them closes the answer with the bridging tokens.
                assert lengths == ([1] * 4 + [4 + model.config.bridge_tokens] if text else [model.config.bridge_tokens])
            assert boxes.shape == (8, 4)
            lengths.clear()
            told = bench_tube_latency.coupled_tube(clip)
            assert lengths == [1] * (len(clip.tube) - 1) and len(clip.tube) > 8 * 4 * 2
        finally:
            for hook in hooks:
                hook.remove()
    truth = SyntheticTubes("test", seed=0, count=1, frame_count=8, fps=4.0, size=(64, 64))[0].boxes()
    assert np.abs(told.numpy() - truth).max() < 0.0006


def test_the_bench_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "can_plot", lambda: False)
    text, code = command.run_benchmarks(
        ["tube_latency"], quick=True, out=tmp_path, device="cpu", echo=lambda line: None
    )
    assert code == 0 and "coupled, boxes as text" in text
    page = next(tmp_path.glob("*/tube_latency.md")).read_text()
    assert "wrong" not in page and "failed" not in page
    benchmark = bench_tube_latency.BENCHMARK
    case = benchmark.cases("cpu", True)[0]
    inputs = _ring(benchmark, case, Settings(torch.device("cpu"), True))[0]
    expected = benchmark.reference(case, inputs)
    assert benchmark.disagreement(case, inputs, expected, expected) is None
    assert benchmark.disagreement(case, inputs, (expected[0] + 0.1,), expected) is not None
    assert benchmark.disagreement(case, inputs, (expected[0] * float("nan"),), expected) is not None


def test_the_comparison_of_two_seeds_is_a_table():
    config = coupled_comparison.configuration(3, 4, 6)
    assert [phase.steps for phase in config.data.phases] == [4, 6] and config.schedule.steps == 10 and config.seed == 3
    name = "coupled (boxes as text)"
    done = [
        {
            "row": name,
            "seed": seed,
            "cpu_seconds": 60.0 + seed,
            "scores": {tier: dict.fromkeys(METRICS, 0.5 + 0.1 * seed) for tier in coupled_comparison.COLUMNS},
        }
        for seed in (0, 1)
    ]
    lines = coupled_comparison.markdown(done, {name: {"image_steps": 900, "clip_steps": 200}}).splitlines()
    assert len(lines) == 2 + len(coupled_comparison.COLUMNS)
    assert lines[2].startswith(f"| {name} | 1,100 | 1.0±0.0 | all | 0.550±0.050 |")


def test_both_rows_begin_with_the_backbone_of_the_start():
    start = shipped_model()
    backbone = load_model(start).backbone.state_dict()
    for row in coupled_comparison.ROWS.values():
        model, _ = coupled_comparison.from_backbone_of(start, row.build, coupled_comparison.configuration(0, 1, 1))
        assert all(torch.equal(value, backbone[name]) for name, value in model.backbone.state_dict().items())
    fresh = coupled_comparison.from_backbone_of(start, build_model, coupled_comparison.configuration(0, 1, 1))[0]
    assert not torch.equal(fresh.memory_projection.weight, load_model(start).memory_projection.weight)
