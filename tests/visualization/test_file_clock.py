"""Pictures of an answer are on the file's own clock; an output never replaces its source."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from bridge_stg.data import probe, write_video
from bridge_stg.errors import OutputError
from bridge_stg.models.result import GroundingResult
from bridge_stg.visualization import annotate_video, draw_strip
from bridge_stg.visualization.charts import Colors, draw_timeline
from bridge_stg.visualization.drawing import PREDICTED
from bridge_stg.visualization.overlay import _time_bar


@pytest.fixture
def video(tmp_path):
    write_video(tmp_path / "clip.mp4", [np.full((64, 96, 3), 20 * n, np.uint8) for n in range(8)], fps=4)
    return tmp_path / "clip.mp4"


@pytest.fixture
def result(video):
    """The second half of a clip whose picture begins at 5 s."""
    return GroundingResult(str(video), "a thing", (6.0, 7.0), "text", 0.9, "", 4.0, 96, 64, 8, (), start_time=5.0)


def test_the_time_bar_begins_with_the_picture(video, result):
    bar = _time_bar(probe(video), result, None)
    drawn = (bar[..., :3] == PREDICTED).all(2).any(0)
    assert (np.flatnonzero(drawn).min(), np.flatnonzero(drawn).max()) == (48, 95)


def test_the_time_line_is_on_the_clock_of_the_file(result):
    axes = Figure().subplots()
    draw_timeline(axes, result, None, 2.0, Colors(), 10.0)
    assert axes.get_xlim() == (5.0, 7.0)


@pytest.mark.parametrize("write", [annotate_video, draw_strip])
def test_the_source_is_not_replaced(tmp_path, video, result, write):
    before = video.read_bytes()
    (tmp_path / "link.mp4").symlink_to(video)
    for output in (video, tmp_path / "link.mp4"):
        with pytest.raises(OutputError, match="is the file that is read"):
            write(video, result, output)
    assert video.read_bytes() == before
