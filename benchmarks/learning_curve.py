"""Draw the losses of a training run: python benchmarks/learning_curve.py runs/tiny/checkpoint-5500 curve.png"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TERMS = ("language", "alignment", "presence", "box", "giou", "token")


def main(checkpoint: str, picture: str) -> None:
    log = json.loads((Path(checkpoint) / "trainer_state.json").read_text())["log_history"]
    figure, axes = plt.subplots(2, 3, figsize=(9, 4), sharex=True, layout="constrained")
    for axis, term in zip(axes.flat, TERMS, strict=True):
        points = [(entry["step"], entry[f"loss_{term}"]) for entry in log if f"loss_{term}" in entry]
        axis.plot(*zip(*points, strict=True), color="#0f766e", linewidth=1.5)
        axis.set_title(term, fontsize=9)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=8)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
