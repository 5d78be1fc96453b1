"""Fine-tune on annotations of your own, and score the result.

    python examples/finetune_on_jsonl.py [FILE.jsonl OUT STEPS]

FILE.jsonl holds one JSON object a line, as docs/data.md describes. Without arguments the example writes 16 clips of
SyntheticTubes and trains on them. The same from the command line: `bridge-stg train my.yaml --out OUT`, where the
YAML holds the settings below. It needs the extra `train`.
"""

import sys
from pathlib import Path

from bridge_stg import load_model
from bridge_stg.data import read_samples, write_split
from bridge_stg.evaluation import Prediction, score_sample
from bridge_stg.training import load_config, train

SETTINGS = [
    "start_from=tiny",  # or a folder of your own; `backbone.name=Qwen/Qwen2.5-VL-7B-Instruct` starts from an MLLM
    "data.batch_size=4",
    "data.spatial_frames=8",  # frames of each clip that the boxes are learnt on
    "data.workers=0",  # decode in this process
    "schedule.warmup_steps=0",
    "schedule.learning_rate=1e-4",
]


def main(annotations: str = "", out: str = "finetuned", steps: str = "5") -> None:
    path = Path(annotations or write_split(Path(out) / "data", "train", 16, seed=0))
    config = load_config("tiny", [*SETTINGS, f"data.sources.mine.path={path}", f"schedule.steps={steps}"])
    trainer = train(config, out)  # a second call with more steps continues from the last checkpoint
    print(f"{trainer.state.global_step} steps, the model is in {out}/.")

    # Ground the first sample with the new model, and compare the answer with the annotation.
    sample = read_samples(path)[0]
    result = load_model(out).ground(sample.video, sample.sentence)
    score = score_sample(sample, Prediction.from_result(sample.id, result))
    print(f"{sample.sentence!r}: tIoU {score.tIoU:.2f}, vIoU {score.vIoU:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
