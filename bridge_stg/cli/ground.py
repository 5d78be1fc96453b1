"""`bridge-stg ground`: one sentence in one video, or a manifest of many."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..errors import BridgeSTGError, OutputError, SampleError
from .console import (
    Device,
    Json,
    Model,
    echo,
    echo_json,
    finite,
    given,
    note,
    path_argument,
    path_option,
    progress,
    stderr,
)

_OUTPUTS = ("annotated.mp4", "strip.png", "result.json")


@dataclass(frozen=True)
class _Options:
    """Options that one video and a manifest have in common, as the command line gives them."""

    model: str | None
    device: str
    spatial_fps: float | None
    as_json: bool


def ground(
    context: typer.Context,
    video: Annotated[Path | None, path_argument("VIDEO", help="A video file.")] = None,
    sentence: Annotated[
        str | None, typer.Argument(help='What to look for, such as "the red circle that moves left".')
    ] = None,
    model: Model = None,
    out: Annotated[
        Path | None,
        path_option(
            "--out", "-o", help="Folder for the annotated MP4, the strip and result.json; a JSONL file for --manifest."
        ),
    ] = None,
    manifest: Annotated[
        Path | None,
        path_option(
            "--manifest",
            help="Ground a JSONL of id, video and sentence instead; run again to resume, under torchrun to share it.",
        ),
    ] = None,
    as_json: Json = False,
    spatial_fps: Annotated[
        float | None,
        typer.Option(
            min=0.01, callback=finite, help="Localise at most this many frames a second, interpolate the rest."
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Records of --manifest grounded at once; all their frames are in memory.")
    ] = 1,
    device: Device = "auto",
    stream: Annotated[
        int | None, typer.Option(min=0, help="Which of VIDEO's video streams, from 0; the default one when left out.")
    ] = None,
) -> None:
    """Find [bold]when[/] and [bold]where[/] SENTENCE happens in VIDEO."""
    options = _Options(model, device, spatial_fps, as_json)
    if manifest is not None:
        if video is not None or out is None:
            raise typer.BadParameter(
                "it takes no VIDEO and SENTENCE, and needs --out FILE.jsonl.", param_hint="--manifest"
            )
        if stream is not None:
            raise typer.BadParameter("it is for one VIDEO.", param_hint="--stream")
        _ground_manifest(manifest, out, batch_size, options)
        return
    if video is None or sentence is None:
        raise typer.BadParameter("both are needed, unless there is a --manifest.", param_hint="VIDEO SENTENCE")
    if given(context, "batch_size"):
        raise typer.BadParameter("it is for --manifest.", param_hint="--batch-size")
    _ground_one(video, stream, sentence, out, options)


def _ground_one(video: Path, stream: int | None, sentence: str, out: Path | None, options: _Options) -> None:
    from ..data import probe
    from ..distributed import own_device
    from ..files import atomic_files, ensure_writable_folder, refuse_source, replaceable, write_text
    from ..json_text import dump_json
    from ..models import load_model
    from ..visualization import annotate_video, draw_strip

    _check_sentence(sentence)
    source = probe(video, stream)
    if out is not None:
        refuse_source(video, *(out / name for name in _OUTPUTS))
        ensure_writable_folder(out)
        for name in _OUTPUTS:
            replaceable(out / name)
    with stderr.status("loading the model"):
        network = load_model(options.model).to(own_device(options.device))
    with stderr.status("grounding"):
        result = network.ground(source, sentence, spatial_fps=options.spatial_fps)
    if result.interval_source == "presence" and network.config.interval_source == "text":
        note("The generated answer holds no readable interval; the presence curve gives it.")
    try:
        text = dump_json(result.to_dict(), indent=2)
    except ValueError as error:
        raise OutputError(f"The result cannot be used: {error}; the weights of the model may not be either.") from error
    if out is not None:
        with atomic_files(out) as folder:
            with progress("annotating") as advance:
                annotate_video(source, result, folder / "annotated.mp4", progress=advance)
            draw_strip(source, result, folder / "strip.png")
            write_text(folder / "result.json", text)
        note(f"wrote annotated.mp4, strip.png and result.json to {out}")
    if options.as_json:
        echo_json(result.to_dict())
    else:
        echo(
            f"{result.interval[0]:.2f} s to {result.interval[1]:.2f} s "
            f"({result.interval_source}, confidence {result.confidence:.2f}), {len(result.tube)} boxes"
        )


def _check_sentence(sentence: str) -> None:
    """Refuse the lone surrogates that a terminal of another encoding sends: no tokenizer takes them."""
    try:
        sentence.encode()
    except UnicodeEncodeError as error:
        raise SampleError(f"The sentence must be UTF-8 text, got {sentence!r}.") from error


def _ground_manifest(manifest: Path, out: Path, batch_size: int, options: _Options) -> None:
    from ..distributed import own_device, rank_and_size
    from ..files import ensure_writable_folder
    from ..inference.fingerprints import model_fingerprint
    from ..inference.manifest import ground_manifest, read_manifest
    from ..inference.resumable_jsonl import check_output
    from ..models import load_model

    ensure_writable_folder(check_output(out).parent)  # a mistake must not wait for the model
    rank, world_size = rank_and_size()
    read_manifest(manifest)
    network = load_model(options.model).to(own_device(options.device))
    with progress("grounding") as advance:
        summary = ground_manifest(
            partial(network.ground_batch, spatial_fps=options.spatial_fps),
            manifest,
            out,
            made_with={"model": model_fingerprint(options.model), "spatial_fps": options.spatial_fps},
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            progress=advance,
        )
    for name, reason in summary.failed.items():
        note(f"{name}: {reason}")
    if options.as_json:
        echo_json(summary.to_dict())
    else:
        state = f"written to {out}" if summary.merged else "the other processes are not done yet"
        echo(f"{summary.grounded} of {summary.records} grounded, {len(summary.failed)} failed; {state}")
    if summary.merged and not summary.grounded:
        raise BridgeSTGError(f"None of the {summary.records} records could be grounded; {out} says why.")
