"""A training process for the tests: `python -m tests.training.worker CONFIG OUT [key=value ...] [--die WHERE AT]`.

With --die the process that `torchrun` numbers last kills itself with SIGKILL, WHERE is "step" (after step AT), "save"
(while checkpoint AT is being written) or "publish" (when it is whole and about to get its name).
"""

from __future__ import annotations

import os
import signal
import sys

import torch
from transformers import TrainerCallback

from bridge_stg.training import BridgeSTGTrainer, load_config, train, trainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAfterStep(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


def prepare_to_die(where: str, at: int) -> list[TrainerCallback]:
    if where == "step":
        return [DieAfterStep(at)]
    if where == "save":
        inner = BridgeSTGTrainer._save_rng_state

        def save(self, folder):
            if self.state.global_step == at:
                die()
            inner(self, folder)

        BridgeSTGTrainer._save_rng_state = save  # type: ignore[method-assign]
    else:
        publish = trainer.publish

        def die_or_publish(run, keep):
            if any(run_entry.endswith(f"-{at}") for run_entry in os.listdir(os.path.join(run, trainer.STAGING))):
                die()
            publish(run, keep)

        trainer.publish = die_or_publish
    return []


def main() -> None:
    torch.set_num_threads(1)
    config, out, *rest = sys.argv[1:]
    callbacks: list[TrainerCallback] = []
    if "--die" in rest:
        place = rest.index("--die")
        where, at = rest[place + 1 : place + 3]
        rest = rest[:place]
        last = int(os.environ.get("WORLD_SIZE", "1")) - 1
        if where == "publish" or int(os.environ.get("RANK", "0")) == last:  # only the first process publishes
            callbacks = prepare_to_die(where, int(at))
    train(load_config(config, rest), out, callbacks=callbacks, tensorboard=False)


if __name__ == "__main__":
    main()
