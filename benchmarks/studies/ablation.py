"""The ablation table: switches at inference, and short trainings from one common start, all tiers, several seeds.

    python -m benchmarks.studies.ablation --start runs/motion --out runs/ablation --steps 250 --seeds 0 1

`runs/motion` is the tiny training before its clips:
`bridge-stg train tiny --out runs/motion --set schedule.steps=3000 --set schedule.decay_share=0`.
Every training row takes the same start, the same clips in the same order and as many steps. Finished rows are
kept in `OUT/results.jsonl` and skipped on a second call; `OUT/ablation.md` is written anew each time.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from bridge_stg.data import GroundingSample, read_samples, write_split
from bridge_stg.evaluation import ConstantFloor, evaluate, random_floor
from bridge_stg.files import write_text
from bridge_stg.inference.dataset import predict_samples
from bridge_stg.models import load_model
from bridge_stg.training import load_config, train

METRICS = ("m_tIoU", "m_vIoU", "gt_vIoU")
COLUMNS = ("all", "single", "distractors", "twins", "interrogative")

AT_INFERENCE: dict[str, dict[str, object]] = {
    "as shipped": {},
    "interval from the text": {"interval_source": "text"},
    "no pruning (keep 1.0)": {"keep": 1.0},
    "keep 0.5": {"keep": 0.5},
    "keep 0.12": {"keep": 0.12},
    "no gate": {"gate": False},
    "queries of the last layer only": {"interactive_queries": "last"},
}

TRAINED: dict[str, list[str]] = {
    "full": [],
    "no STSB (learned queries)": ["model.semantic_bridge=false"],
    "no dense alignment": ["model.dense_alignment=false", "losses.alignment=0"],
    "no frame contrast": ["model.frame_contrast=false", "losses.contrast=0"],
    "no times as text": ['processor.timestamp_format=""'],
    "no LM loss": ["losses.language=0", "model.interval_source=presence"],
    "positive frames only": ["data.positive_ratio=1.0"],
    "tube matching": ["schedule.match_after=0"],
    "no losses on earlier decoder layers": ["losses.auxiliary=0"],
    "no token-in-box loss": ["losses.token=0"],
}


class Results:
    """Finished rows of a study, kept in a JSON Lines file so that a second call goes on.

    Attributes:
        rows: of earlier calls and of this one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def has(self, **fields: object) -> bool:
        """Whether a row has these values."""
        return any(fields.items() <= row.items() for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def evaluation_clips(out: Path, count: int, seed: int) -> list[GroundingSample]:
    """Clips of the test split in a folder of `out`, written at the first call."""
    data = out / f"clips-{seed}" / "test.jsonl"
    if not data.is_file():
        write_split(data.parent, "test", count, seed)
    return read_samples(data)


def score(folder: str | Path | None, settings: dict[str, object], samples) -> dict[str, dict[str, float]]:
    """Metrics per column of the table."""
    summary = evaluate(samples, predict_samples(load_model(folder, settings), samples)).summary
    return select(summary)


def select(summary) -> dict[str, dict[str, float]]:
    rows = {"all": summary["all"], **summary["tiers"]}
    return {name: {metric: rows[name][metric] for metric in METRICS} for name in COLUMNS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, help="model folder that every training row starts from")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--clip-seeds", type=int, nargs="+", default=[1000, 1001, 1002], help="of the inference rows")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rows", nargs="*", help="only these training rows")
    parser.add_argument("--parts", nargs="+", choices=("inference", "trained"), default=["inference", "trained"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    samples = evaluation_clips(options.out, options.clips, options.clip_seeds[0])
    results = Results(options.out / "results.jsonl")

    def known(kind: str, row: str, seed: int | None) -> bool:
        return results.has(kind=kind, row=row, seed=seed)

    def add(kind: str, row: str, seed: int | None, scores: dict[str, dict[str, float]]) -> None:
        results.add({"kind": kind, "row": row, "seed": seed, "scores": scores})
        print(kind, row, seed, scores["all"], flush=True)

    if not known("floor", "best constant", None):
        constant = ConstantFloor.fit(samples).predict(samples)
        add("floor", "best constant", None, select(evaluate(samples, constant).summary))
        add("floor", "random", None, select(evaluate(samples, random_floor(samples)).summary))
    for seed in options.clip_seeds if "inference" in options.parts else ():
        for row, settings in AT_INFERENCE.items():
            if not known("inference", row, seed):
                add("inference", row, seed, score(None, settings, evaluation_clips(options.out, options.clips, seed)))
    for seed in options.seeds:
        for row, settings in TRAINED.items():
            if "trained" not in options.parts or known("trained", row, seed):
                continue
            if options.start is None:
                parser.error("the trained rows need --start")
            if options.rows and row not in options.rows:
                continue
            folder = options.out / f"{row.replace(' ', '-')}-{seed}"
            mix = load_config("tiny").data.phases[-1].mix
            phase = "{" + f"steps: {options.steps}, mix: {mix}" + "}"
            common = [f"start_from={options.start}", f"seed={seed}", f"data.phases=[{phase}]"]
            common += [f"schedule.steps={options.steps}", "schedule.warmup_steps=25", "schedule.decay_share=0.4"]
            train(load_config("tiny", [*common, *settings]), folder, tensorboard=False)
            add("trained", row, seed, score(folder, {}, samples))
    write_text(options.out / "ablation.md", markdown(results.rows))


def markdown(done: list[dict]) -> str:
    """One table a kind; several seeds as mean and half range."""
    lines = []
    for kind in ("floor", "inference", "trained"):
        rows = dict.fromkeys(entry["row"] for entry in done if entry["kind"] == kind)
        lines += [f"## {kind}", "", "| row | seeds | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
        for row in rows:
            found = [entry["scores"] for entry in done if (entry["kind"], entry["row"]) == (kind, row)]
            cells = [" / ".join(cell([f[column][m] for f in found]) for m in METRICS) for column in COLUMNS]
            lines.append(f"| {row} | {len(found)} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([f"Cells: {' / '.join(METRICS)}.", "", *lines])


def cell(values: list[float], digits: int = 3) -> str:
    """Mean and, of several values, half range."""
    spread = f"±{(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
