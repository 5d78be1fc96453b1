"""Groundings as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup

from ..data import GroundingSample, VideoInfo, decode_frames, probe
from ..errors import VideoError
from ..files import ensure_writable_folder, write_text
from .charts import draw_extents, draw_loss, draw_timeline, to_svg, writable
from .drawing import render_frame, scale_frame, true_boxes
from .strip import pick_frames, score_result

if TYPE_CHECKING:
    from ..models.result import GroundingResult, KeptTokens

_PICTURE_WIDTH = 320
_HEAT = matplotlib.colormaps["magma"]
_HEAT_RANGE = (0.35, 0.95)  # of the colour map; its dark end would pass for a dropped token


@dataclass(frozen=True)
class ReportEntry:
    """One grounding in a report.

    Attributes:
        result: what the model said; its video must still be readable.
        sample: the truth, where it is known.
        annotated: an annotated MP4 to embed (see `annotate_video`); the page grows by its size.
        video: what `probe` returned for the result's video; None looks at the file again.
    """

    result: GroundingResult
    sample: GroundingSample | None = None
    annotated: str | os.PathLike[str] | None = None
    video: VideoInfo | None = None


def write_report(
    entries: Sequence[ReportEntry],
    out_html: str | os.PathLike[str],
    title: str = "Spatio-temporal video grounding",
    training: Sequence[tuple[int, float]] | None = None,
    columns: int = 6,
) -> Path:
    """Write a self-contained page: pictures, charts and clips are part of it, and no script is.

    For each entry: sentence, predicted and true interval, tIoU and vIoU, presence curve over the time line,
    `columns` frames with their boxes, the tube over time, and the kept tokens as a heat map over the frames.

    Args:
        training: (step, loss) pairs of a training run, for a loss curve at the end.

    Raises:
        VideoError: a video cannot be read.
        OutputError: the page cannot be written.
    """
    ensure_writable_folder(Path(out_html).parent)
    views = [_view_entry(number, entry, columns) for number, entry in enumerate(entries, start=1)]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bridge_stg.visualization"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: writable(value) if type(value) is str else value,
    )
    scores = [view["score"] for view in views if view["score"] is not None]
    page = environment.get_template("report.html.j2").render(
        title=title,
        entries=views,
        mean_tiou=np.mean([score.tIoU for score in scores]) if scores else None,
        mean_viou=_mean_or_none([score.vIoU for score in scores]),
        heat=", ".join(matplotlib.colors.to_hex(_HEAT(v)) for v in np.linspace(*_HEAT_RANGE, 6)),
        training=_view_training(training or ()),
    )
    write_text(out_html, page)
    return Path(out_html)


def _view_entry(number: int, entry: ReportEntry, columns: int) -> dict[str, Any]:
    """What the template shows of one entry."""
    result, sample = entry.result, entry.sample
    info = probe(result.video) if entry.video is None else entry.video
    rows = 1 + (sample is not None and sample.interval is not None)

    timeline = to_svg(
        lambda figure, colors, size: draw_timeline(figure.add_subplot(), result, sample, info.duration, colors, size),
        (860, (100 if result.presence else 0) + 34 * rows + 30),
        salt=f"timeline-{number}",
    )
    extents = to_svg(
        lambda figure, colors, size: draw_extents(figure, result, sample, colors, size),
        (860, 190),
        salt=f"extents-{number}",
    )
    return {
        "number": number,
        "result": result,
        "sample": sample,
        "name": Path(result.video).name,
        "score": score_result(result, sample),
        "timeline": Markup(timeline),
        "extents": Markup(extents),
        "pictures": _box_pictures(info, entry, columns),
        "heat_maps": _heat_maps(info, result, columns),
        "kept": len(result.kept_tokens[0].index) if result.kept_tokens else 0,
        "tokens": int(np.prod(result.kept_tokens[0].grid)) if result.kept_tokens else 0,
        "clip": None if entry.annotated is None else _embed_clip(entry.annotated),
        "shape": "portrait" if info.height > info.width else "wide" if info.width > 1.6 * info.height else "",
    }


def _box_pictures(info: VideoInfo, entry: ReportEntry, columns: int) -> list[dict[str, Any]]:
    tube = {box.frame: box for box in entry.result.tube}
    truth = true_boxes(entry.sample)
    picked = pick_frames(info.frame_count, list(tube), columns)
    return [
        {
            "uri": _jpeg(render_frame(image, tube.get(frame), truth.get(frame), _PICTURE_WIDTH, thickness=4)),
            "time": info.start_time + float(info.times[frame]),
            "inside": frame in tube,
        }
        for frame, image in zip(picked, decode_frames(info, picked).numpy(), strict=True)
    ]


def _heat_maps(info: VideoInfo, result: GroundingResult, columns: int) -> list[dict[str, Any]]:
    if not result.kept_tokens:
        return []
    rows = pick_frames(len(result.kept_tokens), [], columns)
    kept = [result.kept_tokens[row] for row in rows]
    scores = np.concatenate([entry.score for entry in result.kept_tokens])
    low, high = (float(scores.min()), float(scores.max())) if len(scores) else (0.0, 1.0)
    images = decode_frames(info, [entry.frame for entry in kept]).numpy()
    return [
        {"uri": _jpeg(_draw_heat(image, entry, low, high)), "time": info.start_time + float(info.times[entry.frame])}
        for entry, image in zip(kept, images, strict=True)
    ]


def _draw_heat(frame: np.ndarray, kept: KeptTokens, low: float, high: float) -> np.ndarray:
    """The frame where tokens were kept, tinted by their score; grey and dark where they were dropped."""
    image = scale_frame(frame, _PICTURE_WIDTH / frame.shape[1])
    heat = np.full(kept.grid, np.nan).ravel()
    heat[list(kept.index)] = (np.asarray(kept.score) - low) / max(high - low, 1e-12)
    heat = heat.reshape(kept.grid)
    size = (image.shape[1], image.shape[0])
    shown = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2) * 0.3
    tint = _HEAT(np.nan_to_num(heat) * (_HEAT_RANGE[1] - _HEAT_RANGE[0]) + _HEAT_RANGE[0])[..., :3] * 255
    tint = cv2.resize(tint, size, interpolation=cv2.INTER_NEAREST)
    mask = cv2.resize((~np.isnan(heat)).astype(np.uint8), size, interpolation=cv2.INTER_NEAREST).astype(bool)
    shown[mask] = 0.45 * image[mask] + 0.55 * tint[mask]
    return shown.astype(np.uint8)


def _view_training(training: Sequence[tuple[int, float]]) -> dict[str, Any] | None:
    training = [(step, loss) for step, loss in training if np.isfinite(loss)]
    if not training:
        return None
    window = max(1, len(training) // 20)
    return {
        "curve": Markup(
            to_svg(
                lambda figure, colors, size: draw_loss(figure.add_subplot(), training, colors, size),
                (860, 240),
                salt="loss",
            )
        ),
        "steps": training[-1][0],
        "first": float(np.mean([loss for _, loss in training[:window]])),
        "last": float(np.mean([loss for _, loss in training[-window:]])),
    }


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _jpeg(image: np.ndarray) -> str:
    # Full colour resolution: at the usual half of it, the thin lines of boxes turn grey.
    flags = [
        cv2.IMWRITE_JPEG_QUALITY,
        85,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), flags)
    assert done, "OpenCV always has a JPEG encoder"
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def _embed_clip(path: str | os.PathLike[str]) -> str:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise VideoError(f"{path} cannot be embedded in the report: {error.strerror or error}.") from error
    return "data:video/mp4;base64," + base64.b64encode(data).decode()
