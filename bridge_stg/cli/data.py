"""`bridge-stg data` checks, measures and converts published datasets; `bridge-stg synth` writes a synthetic one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from .console import Json, echo, echo_json, note, path_argument, path_option, progress, show_table, stderr

if TYPE_CHECKING:
    from ..data.readers import Item

app = typer.Typer(
    name="data",
    help="Check, measure and convert the datasets as they are published.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Source = Annotated[Path, path_argument("SOURCE", help="The annotation file; for refcoco also its folder.")]
Format = Annotated[
    str, typer.Option("--format", "-f", help="vidstg, hcstvg-v1, hcstvg-v2, charades-sta, refcoco or jsonl.")
]
Videos = Annotated[Path | None, path_option("--videos", help="Folder of the videos or images, searched by name.")]
Boxes = Annotated[
    Path | None, path_option("--boxes", help="vidstg: VidOR annotations (folder). refcoco: instances.json.")
]
Split = Annotated[str | None, typer.Option(help="refcoco: train, val, testA, testB or test.")]
Convention = Annotated[
    str, typer.Option(help="How frames are numbered: exact, or as in the code of tubedetr or stcat.")
]


def synth(
    folder: Annotated[Path, path_argument("FOLDER", help="Where clips/ and SPLIT.jsonl go.")],
    split: Annotated[str, typer.Option(help="train, val or test; test compositions never occur in train.")] = "test",
    count: Annotated[int, typer.Option(min=1, help="How many clips.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same clips.")] = 0,
    tier: Annotated[list[str] | None, typer.Option(help="A tier; repeat for several. All when left out.")] = None,
    background: Annotated[
        list[Path] | None,
        path_option("--background", help="A real video to draw over; repeat for several. Procedural when left out."),
    ] = None,
) -> None:
    """Write a split of SyntheticTubes: H.264 clips and a JSONL of samples."""
    from ..data import SPLITS, TIERS, write_split

    if split not in SPLITS:
        raise typer.BadParameter(f"{split!r} is none of {', '.join(SPLITS)}.", param_hint="--split")
    for name in tier or ():
        if name not in TIERS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(TIERS)}.", param_hint="--tier")
    with progress("writing clips") as advance:
        path = write_split(
            folder,
            split,
            count,
            seed,
            tiers=tuple(tier or TIERS),
            backgrounds=tuple(background or ()),
            progress=advance,
        )
    echo(path)


@app.command()
def check(
    source: Source,
    format: Format,
    videos: Videos = None,
    boxes: Boxes = None,
    split: Split = None,
    as_json: Json = False,
) -> None:
    """List broken records, missing and corrupt videos, boxes outside the frame, intervals outside the clip.

    The exit code is 0 if nothing is found, else 1; the report is printed either way. Videos are checked if --videos
    says where they are, and for jsonl, whose records say it.
    """
    from ..data.checking import check_dataset

    items = _open(source, format, videos, boxes, split)
    with stderr.status("checking") as status:
        report = check_dataset(
            items,
            videos=videos is not None or format == "jsonl",
            progress=lambda done: status.update(f"checking record {done}") if done % 100 == 0 else None,
        )
    if as_json:
        echo_json({"source": str(source), "format": format, **report.to_dict()})
    else:
        _print_findings(report.to_dict())
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def stats(
    source: Source,
    format: Format,
    out: Annotated[Path | None, path_option("--out", "-o", help="Write the charts here, .png, .svg or .pdf.")] = None,
    videos: Videos = None,
    boxes: Boxes = None,
    split: Split = None,
    as_json: Json = False,
) -> None:
    """Measure clips, events, boxes and sentences, with a chart of each."""
    from ..data.statistics import MEASURES, measure_dataset

    if out is not None and out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"{str(out)!r} is not a .png, .svg or .pdf file.", param_hint="--out")
    with stderr.status("measuring"):
        found = measure_dataset(_open(source, format, videos, boxes, split))
    if out is not None:
        from ..visualization.dataset_charts import draw_statistics

        draw_statistics(found, out, title=f"{source.name}, {format}")
    if as_json:
        echo_json({"source": str(source), "format": format, **found.to_dict()})
        return
    from rich.table import Table

    summary = found.to_dict()
    echo(", ".join(f"{count} {name}" for name, count in summary["counts"].items()))
    table = Table("measure", "mean", "median", "5%", "95%", box=None, header_style="bold")
    for name, row in summary["measures"].items():
        table.add_row(MEASURES[name], *(f"{row[key]:.2f}" for key in ("mean", "median", "p5", "p95")))
    show_table(table)


@app.command()
def convert(
    source: Source,
    format: Format,
    out: Annotated[Path, path_option("--out", "-o", help="The JSONL to write.")],
    videos: Videos = None,
    boxes: Boxes = None,
    split: Split = None,
    convention: Convention = "exact",
    align: Annotated[
        bool, typer.Option("--align", help="Number frames as the decoded videos do; samples without one are left out.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a dataset as JSON Lines, one sample a line; what cannot be read is listed and left out."""
    from ..data.readers import CONVENTIONS, Problem
    from ..data.sample import write_samples
    from ..files import refuse_source

    if convention not in CONVENTIONS:
        raise typer.BadParameter(f"{convention!r} is none of {', '.join(CONVENTIONS)}.", param_hint="--convention")
    if align and (convention != "exact" or (videos is None and format != "jsonl")):
        raise typer.BadParameter("it needs --videos and the exact convention.", param_hint="--align")
    refuse_source(source, out)
    items = _open(source, format, videos, boxes, split, convention)
    if align:
        from ..data.readers.alignment import align_items

        items = align_items(items)
    skipped: list[dict[str, str]] = []
    written = 0

    def samples() -> Iterator[Any]:
        nonlocal written
        for item in items:
            if not isinstance(item, Problem):
                written += 1
                # A bare name means nothing yet: it is taken from the folder of the file.
                named = videos is None and format != "jsonl"
                yield replace(item, video=str(out.parent / item.video)) if named else item
            elif item.skipped:
                skipped.append({"id": item.id, "reason": item.reason})

    with stderr.status("converting"):
        write_samples(out, samples())
    for entry in skipped:
        note(f"{entry['id']}: {entry['reason']}")
    if as_json:
        echo_json({"out": str(out), "written": written, "skipped": skipped})
    else:
        echo(f"{written} samples written to {out}, {len(skipped)} records left out")


def _open(
    source: Path,
    format: str,
    videos: Path | None,
    boxes: Path | None,
    split: str | None,
    convention: str = "exact",
) -> Iterator[Item]:
    from ..data.readers import FORMATS, iterate_dataset
    from ..data.readers import Convention as Name

    if format not in FORMATS:
        raise typer.BadParameter(f"{format!r} is none of {', '.join(FORMATS)}.", param_hint="--format")
    return iterate_dataset(source, format, boxes=boxes, videos=videos, split=split, convention=cast("Name", convention))


def _print_findings(report: dict[str, Any], most: int = 20) -> None:
    echo(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in report["counts"].items()))
    if not report["videos_checked"]:
        echo("videos were not looked at")
    for key in (
        "skipped",
        "missing_videos",
        "corrupt_videos",
        "boxes_outside_frame",
        "intervals_outside_clip",
        "notes",
    ):
        entries = report[key]
        echo(f"{key.replace('_', ' ')}: {len(entries)}")
        for entry in entries[:most]:
            name = entry.get("id", entry.get("video"))
            rest = entry.get("reason") or ", ".join(f"{k} {v}" for k, v in entry.items() if k not in ("id", "video"))
            echo(f"  {name}: {rest}")
        if len(entries) > most:
            echo(f"  and {len(entries) - most} more; --json lists all")
