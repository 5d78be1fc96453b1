"""From a file to a typed result: intervals, tubes at every source frame, odd videos."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from bridge_stg.data import probe, write_video
from bridge_stg.errors import SampleError, VideoError
from bridge_stg.models import GroundingResult
from bridge_stg.models.decoding import CachedDecoding, encode_clips
from bridge_stg.models.grounding import presence_interval, read_answer, source_tube
from bridge_stg.models.processing_bridge_stg import rest_of_answer


def write_clip(path, count, size=(48, 64), **timing):
    rng = np.random.default_rng(0)
    write_video(path, (rng.integers(0, 255, (*size, 3), dtype=np.uint8) for _ in range(count)), **timing)
    return path


def check(result, info):
    start, end = result.interval
    assert 0 <= start < end <= info.duration + 1e-9
    frames = [entry.frame for entry in result.tube]
    inside = np.flatnonzero((info.times >= start - 1e-6) & (info.times < end - 1e-6)).tolist()
    assert frames == (inside or frames[:1])
    for entry in result.tube:
        assert entry.time == pytest.approx(info.times[entry.frame])
        x1, y1, x2, y2 = entry.box
        assert 0 <= x1 <= x2 <= info.width and 0 <= y1 <= y2 <= info.height
    assert result.confidence == pytest.approx(np.mean([entry.presence for entry in result.tube]))
    again = GroundingResult.from_dict(json.loads(result.to_json()))
    assert again == result


def test_a_result_covers_every_source_frame_and_survives_json(make_model, tmp_path):
    path = write_clip(tmp_path / "a.mp4", 60, fps=20)
    result = make_model().ground(path, "what moves left?")
    check(result, probe(path))
    decoded = {point.frame for point in result.presence}
    assert len(decoded) == 12  # 3 s at 4 frames a second
    assert all(entry.interpolated == (entry.frame not in decoded) for entry in result.tube)
    kept = result.kept_tokens[0]
    assert len(kept.index) == len(kept.score) == int(np.ceil(kept.grid[0] * kept.grid[1] / 4))
    assert list(kept.index) == sorted(set(kept.index)) and kept.index[-1] < kept.grid[0] * kept.grid[1]


def test_a_one_frame_video_is_no_error(make_model, tmp_path):
    path = write_clip(tmp_path / "one.mp4", 1, fps=10)
    result = make_model().ground(path, "the red circle")
    check(result, probe(path))
    assert len(result.tube) == 1


def test_time_comes_from_the_timestamps_of_a_variable_frame_rate(make_model, tmp_path):
    times = np.concatenate([np.arange(10) * 0.05, 0.5 + np.arange(8) * 0.25])
    path = write_clip(tmp_path / "vfr.mp4", len(times), times=times.tolist())
    info = probe(path)
    np.testing.assert_allclose(info.times, times, atol=2e-3)
    check(make_model(interval_source="presence").ground(path, "what moves left?"), info)


def test_a_long_clip_is_thinned_to_the_frame_budget(make_model, tmp_path):
    path = write_clip(tmp_path / "long.mp4", 120, size=(32, 32), fps=10)
    result = make_model().ground(path, "what moves left?")
    assert len(result.presence) == 24
    check(result, probe(path))


def test_an_unreadable_answer_falls_back_to_presence(make_model, tmp_path):
    path = write_clip(tmp_path / "a.mp4", 16, fps=8)
    result = make_model().ground(path, "what moves left?")
    assert result.interval_source == "presence"
    assert result.answer


def test_a_readable_answer_is_used(make_model, tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", 16, fps=8)
    monkeypatch.setattr("bridge_stg.models.grounding.parse_answer", lambda text, duration: (0.5, 1.3))
    result = make_model().ground(path, "what moves left?")
    assert result.interval_source == "text"
    assert result.interval == (0.5, 1.25)  # 1.3 s is how 1.25 s is written


def test_missing_videos_and_empty_sentences(make_model, tmp_path):
    with pytest.raises(VideoError, match="nowhere"):
        make_model().ground(tmp_path / "nowhere.mp4", "red")
    with pytest.raises(SampleError, match="must not be empty"):
        make_model().ground(write_clip(tmp_path / "a.mp4", 4, fps=4), " ")


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("from 0.8 s to 1.2 s", (0.75, 1.25)),
        ("from 0.2 s to 2.0 s", (0.25, 2.0)),
        ("from 0.6 s to 0.9 s", (0.6, 0.9)),  # between frames: left as it is
        ("from 0.2 s to 9.0 s", (0.25, 2.0)),
        ("nothing", None),
    ],
)
def test_answers_move_onto_the_frame_times_they_stand_for(text, interval):
    assert read_answer(text, [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75], 2.0) == interval


@pytest.mark.parametrize(
    ("curve", "interval"),
    [
        ([0.1, 0.9, 0.8, 0.2, 0.9, 0.1], (1.0, 3.0)),  # the longest run
        ([0.9, 0.1, 0.1, 0.6, 0.7, 0.8], (3.0, 6.0)),  # a run to the end ends with the clip
        ([0.1, 0.2, 0.4, 0.2, 0.1, 0.1], (2.0, 3.0)),  # nothing above: the peak
        ([0.9] * 6, (0.0, 6.0)),
    ],
)
def test_presence_interval(curve, interval):
    assert presence_interval(np.array(curve), range(6), 6.0, 0.5) == interval


def test_boxes_between_localised_frames_are_linear_in_time(tmp_path):
    info = probe(write_clip(tmp_path / "a.mp4", 8, fps=4))
    boxes = np.array([[0.0, 0.0, 0.5, 0.5], [0.4, 0.2, 0.9, 0.7]])
    frames, tube = source_tube(info.times, (info.width, info.height), (0.25, 1.75), info.times[[2, 4]], boxes)
    assert frames.tolist() == [1, 2, 3, 4, 5, 6]
    first, last = boxes * [64, 48, 64, 48]
    np.testing.assert_allclose(tube, [first, first, (first + last) / 2, last, last, last])


def test_thinning_keeps_the_first_frame_of_each_slot(make_model):
    model = make_model()
    frames = torch.randint(0, 255, (8, 64, 64, 3), dtype=torch.uint8)
    times = [i / 4 for i in range(8)]
    (all_frames,) = model.predict([frames], [times], ["red"], durations=[2.0])
    (thinned,) = model.predict([frames], [times], ["red"], durations=[2.0], spatial_fps=2.0)
    assert thinned.frames.tolist() == all_frames.frames.tolist()[::2]


def test_a_batch_of_files_grounds_as_one_by_one(make_model, tmp_path):
    """Different lengths, frame counts, sizes and sentences."""
    model = make_model()
    videos = [
        write_clip(tmp_path / "a.mp4", 40, fps=20),
        write_clip(tmp_path / "b.mp4", 9, size=(64, 64), fps=8),
        write_clip(tmp_path / "c.mp4", 1, fps=10),
        write_clip(tmp_path / "d.mp4", 60, size=(96, 64), fps=10),
    ]
    sentences = ["what moves left?", "the red circle that moves left", "red", "what moves up?"]
    together = model.ground_batch(videos, sentences, spatial_fps=2.0)
    for video, sentence, result in zip(videos, sentences, together, strict=True):
        alone = model.ground(video, sentence, spatial_fps=2.0)
        check(result, probe(video))
        assert result.answer == alone.answer and result.interval_source == alone.interval_source
        assert result.interval == pytest.approx(alone.interval, abs=1e-4)
        np.testing.assert_allclose([e.box for e in result.tube], [e.box for e in alone.tube], atol=96e-4)
        assert [k.index for k in result.kept_tokens] == [k.index for k in alone.kept_tokens]
    assert model.ground_batch([], []) == []
    with pytest.raises(SampleError, match="got 4 videos and 1 sentences"):
        model.ground_batch(videos, ["red"])


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("source", ["text", "presence"])
def test_odd_numbers_of_frames_give_no_empty_interval(make_model, tmp_path, count, source, monkeypatch):
    """The frame that the processor repeats is no frame of the clip: no time of its own, no token, no presence."""
    path = write_clip(tmp_path / "odd.mp4", count, fps=4)
    model = make_model(interval_source=source)
    for rising in (False, True):  # the last frame is the longest run, or the peak

        def presence(self, rising=rising):
            lengths = self.lengths
            curves = [np.linspace(0.1, 0.4, n) + 0.5 * (np.arange(n) == n - 1) * rising for n in lengths]
            return curves, torch.zeros(len(lengths), dtype=torch.long)

        monkeypatch.setattr("bridge_stg.models.grounding.SpatialPass.presence", presence)
        result = model.ground(path, "what moves left?")
        check(result, probe(path))
        assert [point.frame for point in result.presence] == list(range(count))
        assert len({kept.frame for kept in result.kept_tokens}) == len(result.kept_tokens)


def test_padding_frames_change_no_prediction(make_model):
    model = make_model()
    frames, times = torch.randint(0, 255, (5, 64, 64, 3), dtype=torch.uint8), [0.0, 0.25, 0.5, 0.75, 1.0]
    padded = torch.cat([frames, frames[-1:], frames[-1:], frames[-1:]]), [*times, 1.0, 1.0, 1.0]
    plain, other = model.predict([frames, padded[0]], [times, padded[1]], ["red"] * 2, durations=[1.25] * 2)
    assert len(plain.presence) == len(other.presence) == 5
    np.testing.assert_allclose(plain.presence, other.presence, atol=1e-5)
    assert plain.frames.tolist() == other.frames.tolist()


@pytest.mark.parametrize(
    ("times", "duration", "message"),
    [
        ([0.0, 0.5, 0.25, 1.0], 2.0, r"times\[0\] must ascend and be finite"),
        ([0.0, 0.5, 0.5, 1.0], 2.0, r"times\[0\] must ascend and be finite"),
        ([0.0, float("nan"), 0.5, 1.0], 2.0, r"times\[0\] must ascend and be finite"),
        ([-0.5, 0.0, 0.5, 1.0], 2.0, r"times\[0\] must begin at 0 s or later, got -0.5"),
        ([0.0, 0.5, 1.0], 2.0, r"times\[0\] must have one time for each of 4 frames, got 3"),
        ([0.0, 0.25, 0.5, 1.0], 1.0, r"durations\[0\] must be behind the last frame at 1.0 s, got 1.0"),
        ([0.0, 0.25, 0.5, 1.0], float("inf"), r"durations\[0\] must be behind the last frame"),
    ],
)
def test_times_that_no_clip_has(make_model, times, duration, message):
    with pytest.raises(ValueError, match=message):
        make_model().predict([torch.zeros(4, 64, 64, 3, dtype=torch.uint8)], [times], ["red"], durations=[duration])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"spatial_fps": x}, "spatial_fps must be a finite number above 0") for x in (0, -1, math.nan, math.inf)),
        *(({"spatial_fps": x}, "spatial_fps must be a finite number above 0") for x in ("2", True)),
        ({"oracle_intervals": []}, "oracle_intervals must be as many as the 1 sentences, got 0"),
        ({"oracle_intervals": [(1.5, 0.5)]}, r"oracle_intervals\[0\] must be \(start, end\)"),
        ({"oracle_intervals": [(math.nan, 1.0)]}, r"oracle_intervals\[0\] must be \(start, end\)"),
        ({"sentences": "r"}, "sentences must be a list of texts, got the text 'r'"),
        ({"sentences": [3]}, "sentence must be a text, got int"),
    ],
)
def test_wishes_that_mean_nothing(make_model, options, message):
    clip = {"frames": [torch.zeros(2, 64, 64, 3, dtype=torch.uint8)], "times": [[0.0, 0.5]], "durations": [1.0]}
    with pytest.raises((ValueError, SampleError), match=message):
        make_model().predict(**clip | {"sentences": ["red"]} | options)


def test_a_batch_of_none_and_of_letters(make_model):
    model = make_model()
    assert model.predict([], [], [], durations=[]) == model.ground_batch([], []) == []
    with pytest.raises(ValueError, match="videos must be a list, got the text 'ab'"):
        model.ground_batch("ab", ["red", "blue"])
    with pytest.raises(ValueError, match="spatial_fps must be"):  # before a video is read
        model.ground("none.mp4", "red", spatial_fps=0)


@pytest.mark.parametrize(
    ("part", "what"),
    [("presence_heads", "presence values"), ("box_heads", "boxes"), ("backbone.model.visual", "presence values")],
)
def test_weights_that_are_nan_give_no_result(make_model, tmp_path, part, what):
    path = write_clip(tmp_path / "a.mp4", 8, fps=4)
    model = make_model()
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.data.fill_(torch.nan)
    with pytest.raises(SampleError, match=f"The model's {what} .* not finite numbers"):
        model.ground(path, "red")


def test_json_is_strict(make_model, tmp_path):
    result = make_model().ground(write_clip(tmp_path / "a.mp4", 8, fps=4), "red")
    with pytest.raises(ValueError, match="JSON"):
        dataclasses.replace(result, confidence=float("nan")).to_json()
    with pytest.raises(ValueError, match="JSON"):
        dataclasses.replace(result, interval=(0.0, float("inf"))).to_dict()


def test_answers_are_on_the_clock_of_the_file(make_model, tmp_path):
    """A picture that begins 5 s after the sound: the model sees the same clip, the answer is told 5 s later."""
    path = write_clip(tmp_path / "a.mp4", 16, fps=8)
    model = make_model()
    plain = model.ground(path, "what moves left?")
    late = dataclasses.replace(probe(path), start_time=5.0)
    shifted = model.ground(late, "what moves left?")
    assert shifted.interval == tuple(edge + 5 for edge in plain.interval)
    assert [entry.time for entry in shifted.tube] == [entry.time + 5 for entry in plain.tube]
    assert [point.time for point in shifted.presence] == [point.time + 5 for point in plain.presence]
    assert [entry.box for entry in shifted.tube] == [entry.box for entry in plain.tube]
    assert [entry.frame for entry in shifted.tube] == [entry.frame for entry in plain.tube]
    assert shifted.answer == plain.answer and shifted.confidence == plain.confidence


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("From 3.0 s to 7.5", " s."),
        ("from 3.0 s to 12.5", " s."),
        ("From 3.0 s to 7", None),
        ("From 3.0 s to", None),
        ("From 3.0", None),
        ("left", None),
        ("From 3.0 s to 7.5 s.", None),
    ],
)
def test_an_answer_closes_once_it_has_both_times(text, rest):
    assert rest_of_answer(text) == rest


def test_a_closed_answer_is_read_as_if_token_by_token(make_model, monkeypatch):
    """The end of the answer goes through with the bridging tokens; one row says an interval, the other none."""
    model = make_model(max_answer_tokens=12)
    tokenizer = model.processor.tokenizer
    scripts = [tokenizer("From 0.5 s to 1.0")["input_ids"], tokenizer("left.<|im_end|>")["input_ids"]]
    frames = [torch.randint(0, 255, (4, 64, 64, 3), dtype=torch.uint8) for _ in scripts]
    inputs = model.processor(frames, [[0.0, 0.25, 0.5, 0.75]] * 2, ["what moves left?", "red"])
    with torch.inference_mode():
        ((_, visual),) = encode_clips(model, inputs["pixel_values"], inputs["video_grid_thw"])
        tokens, grids = [visual.tokens(0), visual.tokens(1)], inputs["video_grid_thw"][:, 1:]

        def prefill():
            return CachedDecoding(model, inputs["input_ids"], inputs["attention_mask"], tokens, grids)

        left = [list(script) for script in scripts]

        def say(self, states):
            logits = torch.zeros(2, len(tokenizer))
            for row, script in enumerate(left):
                logits[row, script.pop(0) if script else tokenizer.pad_token_id] = 1.0
            return logits

        monkeypatch.setattr(CachedDecoding, "_logits", say)
        decoding = prefill()
        assert decoding.generate(tokenizer) == ["from 0.5 s to 1.0 s .", "left ."]
        found = decoding.bridge(torch.tensor([True, False]))
        slow = prefill()
        whole = [scripts[0] + tokenizer(" s.<|im_end|>")["input_ids"], scripts[1]]
        for place in range(max(map(len, whole))):
            real = torch.tensor([[place < len(row)] for row in whole])
            ids = torch.tensor([[row[place] if place < len(row) else tokenizer.pad_token_id] for row in whole])
            slow._step(ids, real, slow.mask)
            slow.mask = torch.cat([slow.mask, real.long()], dim=1)
        expected = slow.bridge(torch.tensor([True, False]))
    torch.testing.assert_close(found.interactive, expected.interactive, atol=1e-4, rtol=1e-4)
