"""Decoupled against coupled on SyntheticTubes: one backbone to start from, the same data, equal training compute.

    python -m benchmarks.studies.coupled --out runs/coupled --minutes 15 --seeds 0 1

Both rows take the backbone of the start (the shipped checkpoint where `--start` is left out) and learn everything
else anew: Bridge-STG its bridge and its spatial decoder, the coupled baseline to write boxes. They see the same
curriculum in the same order, images and then clips, and get the same CPU seconds of training, one thread: before
anything else the steps of both are timed in turn, and each row takes as many as fit (`OUT/plan.json`). A row that was
cut short resumes from its last checkpoint, finished ones are kept in `OUT/results.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.baselines.coupled import CoupledForVideoGrounding, build_coupled, collate_coupled
from benchmarks.studies.ablation import COLUMNS, Results, cell, evaluation_clips
from bridge_stg.evaluation import METRICS, evaluate
from bridge_stg.files import write_text
from bridge_stg.inference.dataset import predict_samples
from bridge_stg.models import load_model
from bridge_stg.models.loading import shipped_model
from bridge_stg.training import (
    LossWeights,
    Phase,
    SyntheticCurriculum,
    TrainingBatch,
    TrainingConfig,
    build_model,
    collate_grounding,
    grounding_losses,
    load_config,
    train,
)

IMAGE_SHARE = 0.25
"""Of the compute, on single images, where the boxes of a fresh decoder or of fresh digits begin."""

_KINDS = {"image": ("image",), "pair": ("snippet", "question"), "clip": ("single", "distractors", "twins")}
_ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """How one side is built, fed and loaded again."""

    build: Callable[[TrainingConfig], Any]
    collate: Callable[..., TrainingBatch]
    load: Callable[[Path], Any]


ROWS = {
    "decoupled (Bridge-STG)": Row(build_model, collate_grounding, load_model),
    "coupled (boxes as text)": Row(build_coupled, collate_coupled, CoupledForVideoGrounding.load),
}


def from_backbone_of(start: Path, build: Callable[[TrainingConfig], Any], config: TrainingConfig) -> Any:
    """Build a model, and give it the weights of the backbone in `start`."""
    model, processor = build(config)
    model.backbone.load_state_dict(load_model(start).backbone.state_dict())
    return model, processor


def configuration(seed: int, image_steps: int, clip_steps: int) -> TrainingConfig:
    mix = load_config("tiny").data.phases[-1].mix
    phases = f"[{{steps: {image_steps}, mix: {{image: 1.0}}}}, {{steps: {clip_steps}, mix: {mix}}}]"
    schedule = {"steps": image_steps + clip_steps, "warmup_steps": 100, "decay_share": 0.3, "save_every": 100}
    settings = [f"schedule.{name}={value}" for name, value in schedule.items()]
    return load_config("tiny", [f"seed={seed}", f"data.phases={phases}", *settings])


def plan(start: Path, minutes: float) -> dict[str, Any]:
    """Time a step of every row by kind of batch, in turn, and work out how many steps each row takes."""
    config = configuration(0, 1, 1)
    built = {name: from_backbone_of(start, row.build, config) for name, row in ROWS.items()}
    seconds: dict[str, dict[str, float]] = {name: {} for name in ROWS}
    for kind, tiers in _KINDS.items():
        phase = Phase(1, dict.fromkeys(tiers, 1.0))
        data = SyntheticCurriculum([phase], batch_size=config.data.batch_size, length=config.data.batch_size)
        groups = [data[i] for i in range(len(data))]
        steps = {name: _step(*built[name], row.collate, groups) for name, row in ROWS.items()}
        for step in steps.values():
            step()
        samples: dict[str, list[float]] = {name: [] for name in ROWS}
        for _ in range(_ROUNDS):
            for name, step in steps.items():
                begun = time.process_time()
                step()
                samples[name].append(time.process_time() - begun)
        for name, found in samples.items():
            seconds[name][kind] = statistics.median(found)
    mix = config.data.phases[-1].mix
    shares = {kind: sum(mix.get(tier, 0.0) for tier in tiers) for kind, tiers in _KINDS.items()}
    shares["clip"] = sum(mix.values()) - shares["image"] - shares["pair"]
    found_plan: dict[str, Any] = {"minutes": minutes, "rows": {}}
    for name, of in seconds.items():
        mixed = sum(shares[kind] * of[kind] for kind in shares) / sum(shares.values())
        images, clips = 60 * minutes * IMAGE_SHARE / of["image"], 60 * minutes * (1 - IMAGE_SHARE) / mixed
        found_plan["rows"][name] = {"seconds": of, "image_steps": round(images), "clip_steps": round(clips)}
    return found_plan


def _step(model: Any, processor: Any, collate: Callable[..., TrainingBatch], groups: list[Any]) -> Callable[[], None]:
    """An optimiser step on one batch as the trainer takes it; with a rate of 0, it changes nothing."""
    batch = collate(groups, processor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model.train()

    def step() -> None:
        losses = grounding_losses(model(**batch.inputs), batch.targets, LossWeights(), match_one=False)
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


class CpuClock(TrainerCallback):
    """CPU seconds of training, over all the runs of one row; kept beside its checkpoints."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.before = json.loads(file.read_text())["cpu_seconds"] if file.is_file() else 0.0
        self.begun = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = time.process_time()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note()

    def note(self) -> float:
        total = self.before + time.process_time() - self.begun
        write_text(self.file, json.dumps({"cpu_seconds": total}) + "\n")
        return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, default=shipped_model(), help="model folder whose backbone both take")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15.0, help="of CPU time for the training of a row")
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--clip-seed", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--plan", action="store_true", help="work out the steps, and stop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    plan_file = options.out / "plan.json"
    if not plan_file.is_file():
        write_text(plan_file, json.dumps(plan(options.start, options.minutes), indent=1) + "\n")
    steps = json.loads(plan_file.read_text())["rows"]
    if options.plan:
        print(plan_file.read_text())
        return
    samples = evaluation_clips(options.out, options.clips, options.clip_seed)
    results = Results(options.out / "results.jsonl")
    for seed in options.seeds:
        for name, row in ROWS.items():
            if results.has(row=name, seed=seed):
                continue
            folder = options.out / f"{name.partition(' ')[0]}-{seed}"
            clock = CpuClock(options.out / f"{folder.name}.json")
            if not (folder / "model.safetensors").is_file():
                train(
                    configuration(seed, steps[name]["image_steps"], steps[name]["clip_steps"]),
                    folder,
                    callbacks=[clock],
                    tensorboard=False,
                    build=partial(from_backbone_of, options.start, row.build),
                    collate=row.collate,
                )
            seconds = json.loads(clock.file.read_text())["cpu_seconds"]
            summary = evaluate(samples, predict_samples(row.load(folder), samples)).summary
            scores = {"all": summary["all"], **summary["tiers"]}
            results.add({"row": name, "seed": seed, "cpu_seconds": seconds, "scores": scores})
            print(name, seed, f"{seconds:.0f} s", scores["all"], flush=True)
    write_text(options.out / "coupled_comparison.md", markdown(results.rows, steps))


def markdown(done: list[dict[str, Any]], steps: dict[str, Any]) -> str:
    """One line a row and tier; several seeds as mean and half range."""
    lines = ["| row | steps | CPU minutes | tier | " + " | ".join(METRICS) + " |", "|---" * (4 + len(METRICS)) + "|"]
    for name in dict.fromkeys(entry["row"] for entry in done):
        found = [entry for entry in done if entry["row"] == name]
        count = steps[name]["image_steps"] + steps[name]["clip_steps"]
        head = [name, f"{count:,}", cell([entry["cpu_seconds"] / 60 for entry in found], 1)]
        for tier in COLUMNS:
            cells = [cell([entry["scores"][tier][metric] for entry in found]) for metric in METRICS]
            lines.append(f"| {' | '.join([*head, tier, *cells])} |")
            head = [""] * len(head)
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
