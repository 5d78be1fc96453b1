"""`bridge-stg evaluate`: score a model on a dataset, or a file of predictions against one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..distributed import own_device, rank_and_size
from ..errors import BridgeSTGError, ConfigError
from .console import (
    Device,
    Json,
    Model,
    echo_json,
    given,
    note,
    path_option,
    progress,
    read_settings,
    show_table,
)

if TYPE_CHECKING:
    import torch

    from ..data import GroundingSample
    from ..evaluation import MetricProtocol, Prediction
    from ..inference.outcome import Outcome

_OF_A_MODEL = ("model", "split", "settings", "limit", "batch_size", "floors", "device")


def evaluate(
    context: typer.Context,
    data: Annotated[
        Path | None,
        path_option("--data", "-d", help="Ground the samples of a folder with SPLIT.jsonl, or a JSONL file."),
    ] = None,
    dataset: Annotated[
        Path | None,
        path_option("--dataset", help="Score the file --predictions against this JSONL; needs no model and no video."),
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="How to score: every_frame, tubedetr, stcat, hcstvg_official or ptd.")
    ] = "every_frame",
    model: Model = None,
    split: Annotated[str, typer.Option(help="Which SPLIT.jsonl of the folder.")] = "test",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Switch of the model at inference, key=value, such as keep=1.0 or gate=false."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first samples.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    predictions: Annotated[
        Path | None,
        path_option(
            "--predictions",
            help="Predictions, one JSON a line: read with --dataset; with --data written as they come, so that a run "
            "resumes, and several processes (torchrun) share it.",
        ),
    ] = None,
    floors: Annotated[
        bool, typer.Option(help="Add the trivial baselines: best constant answer, random answer.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score a model or a file: m_tIoU, m_vIoU, vIoU@0.3, vIoU@0.5 and gt_vIoU per sentence type and tier."""
    from ..evaluation import PROTOCOLS

    if protocol not in PROTOCOLS:
        raise typer.BadParameter(f"{protocol!r} is none of {', '.join(PROTOCOLS)}.", param_hint="--protocol")
    if (data is None) == (dataset is None):
        raise typer.BadParameter("give one of both, and only one.", param_hint="--data, --dataset")
    if dataset is not None:
        if predictions is None:
            raise typer.BadParameter("--dataset needs the file to score.", param_hint="--predictions")
        if unused := given(context, *_OF_A_MODEL):
            raise typer.BadParameter("it is for --data: --dataset scores a whole file as it is.", param_hint=unused[0])
        _score_file(dataset, predictions, protocol, as_json)
        return
    assert data is not None
    if data.is_file() and (unused := given(context, "split")):
        raise typer.BadParameter("it is for a folder, and --data is a file.", param_hint=unused[0])
    grounding = _Grounding(model, _switches(settings), own_device(device), batch_size, predictions)

    from ..inference.dataset import find_samples

    everything = find_samples(data, split)
    samples = everything[:limit]
    outcomes = _ground(everything, samples, grounding)
    if outcomes is None:
        note("This process is done; the last one scores.")
        return
    report = _report(samples, outcomes, PROTOCOLS[protocol], floors)
    for failure in report["failed"]:
        note(f"{failure['id']}: {failure['reason']}")
    _show(report, as_json)
    if len(report["failed"]) == len(samples):
        raise BridgeSTGError(f"None of the {len(samples)} samples could be grounded.")


@dataclass(frozen=True)
class _Grounding:
    """How samples are grounded, as the command line says."""

    model: str | None
    settings: dict[str, Any]
    device: torch.device
    batch_size: int
    out: Path | None


def _switches(pairs: list[str] | None) -> dict[str, Any]:
    """Settings of the model, checked before it is loaded."""
    from ..models.configuration_bridge_stg import MODEL_RULES
    from ..settings import check_fields

    return check_fields(read_settings(pairs), MODEL_RULES, "--set")


def _ground(
    everything: list[GroundingSample], samples: list[GroundingSample], grounding: _Grounding
) -> list[Outcome[Prediction]] | None:
    """The outcomes of `samples`, which are the first of `everything`; None where another process has them."""
    from ..inference.dataset import ground_dataset, ground_samples
    from ..inference.fingerprints import model_fingerprint, samples_fingerprint
    from ..models import load_model

    rank, world_size = rank_and_size()
    if world_size > 1 and grounding.out is None:
        raise ConfigError(f"{world_size} processes share an evaluation through a file: name it with --predictions.")
    network = load_model(grounding.model, grounding.settings).to(grounding.device)
    with progress("grounding") as advance:
        if grounding.out is None:
            outcomes = []
            for outcome in ground_samples(network, samples, batch_size=grounding.batch_size):
                outcomes.append(outcome)
                advance(len(outcomes), len(samples))
            return outcomes
        return ground_dataset(
            network,
            samples,
            grounding.out,
            made_with={
                "model": model_fingerprint(grounding.model),
                "settings": grounding.settings,
                "data": samples_fingerprint(everything),  # not of the first alone: --limit may grow
            },
            batch_size=grounding.batch_size,
            rank=rank,
            world_size=world_size,
            progress=advance,
        )


def _report(
    samples: list[GroundingSample], outcomes: list[Outcome[Prediction]], protocol: MetricProtocol, floors: bool
) -> dict[str, Any]:
    """The metrics, with what is missing or failed; with `floors`, those of the trivial baselines too."""
    from ..evaluation import ConstantFloor, random_floor
    from ..evaluation import evaluate as score

    scored = score(samples, [outcome.answer for outcome in outcomes if outcome.answer is not None], protocol)
    report = scored.summary | {
        "samples": len(samples),
        "missing": list(scored.missing),
        "failed": [{"id": o.id, "reason": o.reason} for o in outcomes if o.answer is None],
    }
    if floors:
        constant = ConstantFloor.fit(samples).predict(samples)
        report["floors"] = {
            "best constant": score(samples, constant, protocol).summary,
            "random": score(samples, random_floor(samples), protocol).summary,
        }
    return report


def _score_file(dataset: Path, predictions: Path, protocol: str, as_json: bool) -> None:
    from ..evaluation import PROTOCOLS, score_files

    report = score_files(dataset, predictions, PROTOCOLS[protocol])
    for name, what in (("missing", "have no prediction and score 0"), ("left_out", "are left out by the protocol")):
        if report[name]:
            note(f"{len(report[name])} samples {what}.")
    if report["unexpected"]:
        note(f"{len(report['unexpected'])} predictions answer no sample of {dataset}.")
    _show(report, as_json)


def _show(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        echo_json(report)
    else:
        from .tables import metrics_table

        show_table(metrics_table(report))
