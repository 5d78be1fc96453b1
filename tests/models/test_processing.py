"""Text layout, frame sizes, answers, padding."""

import numpy as np
import pytest
import torch

from bridge_stg.errors import SampleError
from bridge_stg.models import BridgeSTGProcessor
from bridge_stg.models.processing_bridge_stg import answer_text, parse_answer


def tokens(processor, ids):
    return processor.tokenizer.convert_ids_to_tokens(ids)


def test_the_sentence_comes_before_the_video_and_every_group_after_its_time(processor):
    text = processor.prompt("what moves left?", [0.1, 0.6], 2)
    found = tokens(processor, processor.tokenizer(text)["input_ids"])
    video = ["<|vision_start|>", "<|video_pad|>", "<|video_pad|>", "<|vision_end|>"]
    sentence = ["what", "moves", "left", "?"]
    assert found == [
        *["<|im_start|>", "user", "\n", *sentence, "\n"],
        *["0.1", *video, "0.6", *video],
        *["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"],
    ]


def test_timestamps_can_be_left_out(processor):
    bare = BridgeSTGProcessor(processor.tokenizer, timestamp_format="")
    assert "0.6" not in bare.prompt("what moves left?", [0.1, 0.6], 2)


def test_training_sequences_end_with_answer_and_bridging_tokens(processor, batch):
    inputs, answer = batch
    for row in range(2):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        end = tokens(processor, ids.tolist())[-12:]
        assert end[-4:] == [f"<|bridge_{i}|>" for i in range(4)]
        assert end[:8] == tokens(processor, inputs["input_ids"][row][answer[row]].tolist())
    assert tokens(processor, inputs["input_ids"][0][answer[0]].tolist()) == [
        *["from", "0.5", "s", "to", "1.2", "s", ".", "<|im_end|>"]
    ]
    labels = inputs["labels"]
    assert (labels[answer] == inputs["input_ids"][answer]).all()
    assert (labels[~answer] == -100).all()


def test_prompts_are_padded_on_the_left_for_generation(processor, clips):
    frames, times = [clip.render() for clip in clips], [(np.arange(8) / 4).tolist()] * 2
    features = processor(frames, times, ["the red circle that moves left", "what moves up?"])
    assert features["attention_mask"][:, -1].tolist() == [1, 1]
    assert features["attention_mask"][1, 0] == 0
    assert "labels" not in features


def test_an_odd_number_of_frames_repeats_the_last(processor, clips):
    frames = clips[0].render()[:5]
    features = processor([frames], [[0.0, 0.25, 0.5, 0.75, 1.0]], ["what moves up?"])
    assert features["video_grid_thw"].tolist() == [[3, 8, 8]]
    assert features["frame_times"].tolist() == [[0.0, 0.25, 0.5, 0.75, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("From 3.0 s to 7.5 s.", (3.0, 7.5)),
        ("from 3.0 s to 7.5 s .", (3.0, 7.5)),
        ("from 3 to 99", (3.0, 10.0)),
        ("From 7.5 s to 3.0 s.", None),
        ("From 3.0 s to 3.0 s.", None),
        ("From 12.0 s to 14.0 s.", None),
        ("from to s .", None),
        ("", None),
    ],
)
def test_answers_are_read_or_refused(text, interval):
    assert parse_answer(text, 10.0) == interval


def test_an_answer_survives_the_tokenizer(processor):
    text = answer_text((0.75, 12.5))
    ids = processor.tokenizer(text)["input_ids"]
    assert parse_answer(processor.tokenizer.decode(ids), 20.0) == (0.8, 12.5)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (272, 640), (1080, 1920), (17, 500), (500, 17)])
def test_frame_sizes_keep_to_the_budget_and_the_aspect(processor, height, width):
    _, grid = processor.pixel_values(torch.zeros((2, height, width, 3), dtype=torch.uint8))
    h, w = (grid[0, 1:] * processor.patch_size).tolist()
    assert h % 16 == 0 and w % 16 == 0
    assert h * w <= 64 * 64 or min(h, w) == 16
    if 0.25 < height / width < 4:
        assert 0.5 < (h / w) / (height / width) < 2


def test_an_empty_sentence_is_refused(processor):
    with pytest.raises(SampleError, match="must not be empty"):
        processor.prompt("  \n ", [0.1], 1)


def test_half_a_character_is_refused(processor):
    with pytest.raises(SampleError, match=r"must be UTF-8 text, got 'the \\ud83d'"):
        processor.prompt("the \ud83d", [0.1], 1)


def test_a_sentence_beyond_the_context_is_refused(processor, clips):
    sentence = "red " * processor.tokenizer.model_max_length
    with pytest.raises(SampleError, match="the model's context holds"):
        processor([clips[0].render()], [(np.arange(8) / 4).tolist()], [sentence])


def test_round_trip(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = BridgeSTGProcessor.from_pretrained(tmp_path)
    assert again.max_pixels == processor.max_pixels and again.timestamp_format == processor.timestamp_format
    text = processor.prompt("the red star moving downwards", [0.1, 29.9, 30.0], 4)
    assert again.tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
    video = torch.randint(0, 255, (4, 48, 80, 3), dtype=torch.uint8)
    torch.testing.assert_close(again.pixel_values(video)[0], processor.pixel_values(video)[0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sentences": ["a", "b"]}, "sentences must be as many as the 1 clips, got 2"),
        ({"sentences": "a"}, "sentences must be a list, got the text 'a'"),
        ({"answers": ["a", "b"]}, "answers must be as many as the 1 clips, got 2"),
        ({"frame_times": [[0.0]]}, r"frame_times\[0\] must be finite, one for each of 2 frames"),
        ({"frame_times": [[0.0, float("nan")]]}, r"frame_times\[0\] must be finite"),
    ],
)
def test_a_batch_that_does_not_fit_itself_is_refused(processor, changed, message):
    batch = {"frames": [np.zeros((2, 64, 64, 3), np.uint8)], "frame_times": [[0.0, 0.5]], "sentences": ["a"]}
    with pytest.raises(ValueError, match=message):
        processor(**batch | changed, training=True)
