"""The curriculum: phases, one task a batch, determinism, labels that agree with the clip."""

import numpy as np
import pytest
import torch

from bridge_stg.data import VOCABULARY
from bridge_stg.errors import ConfigError
from bridge_stg.models.tiny import tiny_processor
from bridge_stg.training import ItemOptions, Phase, SyntheticCurriculum, collate_grounding

PHASES = [Phase(2, {"image": 1.0}), Phase(3, {"single": 0.5, "image": 0.5}), Phase(1, {"twins": 1.0})]


def curriculum(phases=PHASES, **options):
    return SyntheticCurriculum(
        phases, batch_size=2, images_per_clip=3, options=ItemOptions(spatial_frames=6), **options
    )


def is_image(items):
    return items[0].interval is None


def test_phases_follow_each_other_and_the_last_goes_on():
    data = curriculum()
    kinds = [is_image(data[2 * batch]) for batch in range(8)]
    assert kinds[:2] == [True, True]
    assert kinds[5:] == [False, False, False]


def test_a_batch_holds_one_task():
    data = curriculum([Phase(1, {"single": 0.5, "image": 0.5})])
    kinds = {(is_image(data[2 * b]), is_image(data[2 * b + 1])) for b in range(12)}
    assert kinds == {(True, True), (False, False)}


def test_an_image_place_holds_several_images():
    assert [len(curriculum()[i]) for i in (0, 10)] == [3, 1]


def test_items_are_a_function_of_seed_and_index():
    a, b, other = (curriculum(seed=s)[11][0] for s in (4, 4, 5))
    np.testing.assert_array_equal(a.frames, b.frames)
    np.testing.assert_array_equal(a.frame_index, b.frame_index)
    assert a.sentence == b.sentence
    assert not np.array_equal(a.frames, other.frames)


@pytest.mark.parametrize(
    ("steps", "mix", "message"),
    [
        (1, {"triplets": 1.0}, "'triplets' is none of them"),
        (0, {"single": 1.0}, "steps >= 1"),
        (1, {}, "positive weights"),
    ],
)
def test_impossible_phases_are_refused(steps, mix, message):
    with pytest.raises(ConfigError, match=message):
        Phase(steps, mix)
    with pytest.raises(ConfigError, match="at least one phase"):
        curriculum([])


def test_labels_agree_with_the_clip():
    data = curriculum([Phase(1, {"distractors": 1.0})])
    items = [data[i][0] for i in range(4)]
    batch = collate_grounding([[item] for item in items], tiny_processor(VOCABULARY))
    targets = batch.targets
    for row, item in enumerate(items):
        start, end = item.interval
        assert targets.inside[row].nonzero().flatten().tolist() == list(range(start, end))
        for s, frame in enumerate(batch["frame_index"][row].tolist()):
            assert bool(targets.present[row, s]) == (start <= frame < end)
            x1, y1, x2, y2 = item.boxes[frame]
            expected = torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])
            torch.testing.assert_close(targets.boxes[row, s], expected)
        assert bool(batch["hidden_answer"][row].any()) == item.hide_answer
        positives = int(targets.present[row].sum())
        assert 0 < positives < 6


def test_images_carry_boxes_and_no_time():
    data = curriculum([Phase(1, {"image": 1.0})])
    batch = collate_grounding([data[0], data[1]], tiny_processor(VOCABULARY))
    targets = batch.targets
    assert targets.has_box.all() and len(targets.has_box) == 6
    assert not targets.has_presence.any() and not targets.has_interval.any()
    assert (batch["labels"] == -100).all()
