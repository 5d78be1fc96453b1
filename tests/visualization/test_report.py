"""The HTML report: complete in itself, escaped, and honest about what is not known."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from bridge_stg.errors import OutputError, VideoError
from bridge_stg.visualization import ReportEntry, annotate_video, write_report
from bridge_stg.visualization.report import _draw_heat

from .conftest import make_clip_in

SENTENCE = "what costs $5 & says \"<script>alert('x')</script>\"?"
VOID = {"meta", "img", "br", "input", "link", "hr"}


class Page(HTMLParser):
    """Collects tags and checks that they are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def values(self, name: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(name)) is not None]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    folder = tmp_path_factory.mktemp("report")
    known, unknown = make_clip_in(folder), make_clip_in(folder, 128, 72, sentence=SENTENCE)
    clip = annotate_video(known.video, known.result, folder / "annotated.mp4")
    bare = replace(unknown.result, kept_tokens=(), presence=(), interval_source="presence", answer="")
    loss = [(step, 8 * 0.97**step) for step in range(0, 200, 2)]
    out = write_report(
        [ReportEntry(known.result, known.sample, clip), ReportEntry(bare)],
        folder / "out" / "report.html",
        title="A <title>",
        training=[*loss, (200, float("nan"))],
    )
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


def test_page_is_self_contained(report: tuple[str, Page]) -> None:
    text, page = report
    assert all(tag not in ("script", "link", "iframe", "object") for tag, _ in page.tags)
    assert all(source.startswith("data:") for source in page.values("src"))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert all(reference[0] == "#" and reference[1:] in ids for reference in page.values("href"))
    targets = re.findall(r"url\((.)([^)]*)\)", text)
    assert targets
    assert all(first == "#" and rest in ids for first, rest in targets)
    assert "://" not in text
    assert "@import" not in text


def test_page_shows_every_entry(report: tuple[str, Page]) -> None:
    text, _ = report
    assert "the red square moves right" in text
    assert SENTENCE not in text
    assert text.count(escape(SENTENCE).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")) == 2
    assert "A &lt;title&gt;" in text
    assert "1.25\u20133.25 s" in text
    assert "1.00\u20133.00 s" in text
    assert "tIoU <b>0.78</b>" in text
    assert "vIoU <b>0.54</b>" in text
    assert "From 1.2 s to 3.2 s." in text
    assert "The interval comes from the presence curve." in text
    assert "4 of 24 tokens kept a frame" in text
    assert "Every token was kept: pruning was off." in text
    assert text.count("<article") == 2


def test_pictures_and_clip_are_embedded(report: tuple[str, Page]) -> None:
    _, page = report
    sources = page.values("src")
    assert sum(source.startswith("data:image/jpeg") for source in sources) == 6 + 4 + 6
    for source in sources:
        data = base64.b64decode(source.split(",", 1)[1], validate=True)
        assert data[:3] == b"\xff\xd8\xff" or data[4:8] == b"ftyp"
    assert sum(source.startswith("data:video/mp4") for source in sources) == 1
    assert all("alt" in attrs for tag, attrs in page.tags if tag == "img")


def test_charts_take_the_colours_of_the_page(report: tuple[str, Page]) -> None:
    text, page = report
    charts = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(charts) == 2 * 2 + 1
    assert all("var(--predicted)" in chart and "var(--muted)" in chart for chart in charts)
    assert [("var(--true)" in chart) for chart in charts] == [True, True, False, False, False]
    assert "prefers-color-scheme: dark" in text
    assert "#0100" not in text
    assert not any("width" in attrs for tag, attrs in page.tags if tag == "svg")


def test_training_section(report: tuple[str, Page], make_clip: Callable, tmp_path: Path) -> None:
    text, _ = report
    assert "198 steps; the loss went from 7.1" in text
    clip = make_clip()
    plain = write_report([ReportEntry(clip.result, clip.sample)], tmp_path / "plain.html").read_text()
    assert "Training" not in plain
    assert "<video" not in plain


def test_one_frame_and_no_entries(make_clip: Callable, tmp_path: Path) -> None:
    clip = make_clip(count=1)
    text = write_report([ReportEntry(clip.result, clip.sample)], tmp_path / "r.html").read_text()
    assert "1 frame\n" in text
    assert "1 sentence" in text
    Page(write_report([], tmp_path / "none.html").read_text())


def test_disjoint_intervals(make_clip: Callable, tmp_path: Path) -> None:
    clip = make_clip()
    late = replace(clip.result, tube=tuple(e for e in clip.result.tube if e.frame == 12), interval=(3.0, 3.25))
    text = write_report([ReportEntry(late, clip.sample)], tmp_path / "r.html").read_text()
    assert "no frame in both intervals" in text
    assert "tIoU <b>0.00</b>" in text


def test_the_same_report_twice_is_the_same_file(make_clip: Callable, tmp_path: Path) -> None:
    clip = make_clip()
    first, second = (
        write_report([ReportEntry(clip.result, clip.sample)], tmp_path / f"{i}.html").read_text() for i in "ab"
    )
    assert first == second


def test_errors_leave_nothing_behind(make_clip: Callable, tmp_path: Path) -> None:
    clip = make_clip()
    out = tmp_path / "out" / "r.html"
    with pytest.raises(VideoError, match="cannot be embedded"):
        write_report([ReportEntry(clip.result, annotated=tmp_path / "none.mp4")], out)
    with pytest.raises(VideoError, match=r"gone\.mp4"):
        write_report([ReportEntry(replace(clip.result, video="gone.mp4"))], out)
    assert not out.exists()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError):
        write_report([ReportEntry(clip.result)], tmp_path / "folder")


def test_heat_map_dims_what_was_dropped(make_clip: Callable, tmp_path: Path) -> None:
    kept = make_clip().result.kept_tokens[0]
    frame = np.full((64, 96, 3), 120, dtype=np.uint8)
    heat = _draw_heat(frame, kept, -1.5, 2.0)
    rows, columns = heat.shape[0] // 4, heat.shape[1] / 6
    cells = [heat[int((i // 6 + 0.5) * rows), int((i % 6 + 0.5) * columns)].astype(int) for i in range(24)]
    assert all(cell.max() < 50 for i, cell in enumerate(cells) if i not in kept.index)
    brightness = [cells[i].sum() for i in kept.index]
    assert np.argsort(brightness).tolist() == np.argsort(kept.score).tolist()
    assert min(brightness) > 3 * 50


def test_what_no_page_can_hold_is_replaced(make_clip: Callable, tmp_path: Path) -> None:
    clip = make_clip()
    odd = replace(clip.result, sentence="half \ud800 & $x^$ \x00\x1b[31m", answer="\udfff<b>")
    text = write_report([ReportEntry(odd)], tmp_path / "r.html", title="T \ud800").read_text(encoding="utf-8")
    assert "half \ufffd &amp; $x^$ \ufffd\ufffd[31m" in text and "\ufffd&lt;b&gt;" in text and "T \ufffd" in text
