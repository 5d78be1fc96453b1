"""Length-aware batches: one grid each, within their bound, nothing lost or doubled, the same for the same seed."""

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler

from bridge_stg.training import ClipShape, LengthAwareBatches

GRIDS = [(8, 8), (8, 14), (14, 8)]


def shape(place):
    rng = np.random.default_rng(place)
    grid = GRIDS[int(rng.choice(3, p=[0.7, 0.25, 0.05]))]
    return ClipShape(grid, int(rng.integers(1, 33)) * grid[0] * grid[1] // 4 + 64)


def make(**options):
    return LengthAwareBatches(shape, **({"batches": 400, "clips": 4, "world_size": 2} | options))


def cost(batch):
    return len(batch) * max(shape(place).tokens for place in batch)


def test_a_batch_has_one_grid_and_stays_within_its_bounds():
    for batch in make(max_tokens=2000):
        assert len({shape(place).grid for place in batch}) == 1
        assert len(batch) <= 4
        assert len(batch) == 1 or cost(batch) <= 2000


def test_no_place_is_lost_or_doubled():
    batches = list(make())
    places = [place for batch in batches for place in batch]
    assert len(places) == len(set(places))
    window = make().window
    whole = max(places) // window - 1  # of the last windows some places are still to come
    assert set(range(whole * window)) <= set(places)


def test_rare_shapes_are_not_put_off_for_long():
    window = make().window
    seen = 0
    for batch in make():
        seen = max(seen, *batch)
        assert min(batch) > seen - 3 * window


def test_processes_get_batches_of_about_one_size():
    costs = np.array([cost(batch) for batch in make()]).reshape(-1, 2)
    alone = np.array([cost([4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3]) for i in range(400)]).reshape(-1, 2)

    def waiting(costs):
        return 1 - costs.sum() / (2 * costs.max(1)).sum()

    assert waiting(costs) < 0.05 < waiting(alone)


def test_little_is_padding():
    def padding(batches):
        real = sum(shape(place).tokens for batch in batches for place in batch)
        return 1 - real / sum(map(cost, batches))

    assert padding(list(make())) < 0.1 < padding([list(range(4 * i, 4 * i + 4)) for i in range(400)])


def test_the_order_is_a_function_of_the_seed():
    assert list(make()) == list(make())
    assert list(make()) != list(make(seed=1))
    assert list(make(batches=100)) == list(make())[:100]
    assert len(make()) == 400


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_batches_and_resume_by_number(world_size):
    batches = make(world_size=world_size, batches=60)
    shards = [BatchSamplerShard(batches, world_size, rank, even_batches=False) for rank in range(world_size)]
    shares = [list(shard) for shard in shards]
    assert [len(share) for share in shares] == [60 // world_size] * world_size
    assert [batch for one_each in zip(*shares, strict=True) for batch in one_each] == list(batches)
    for shard, share in zip(shards, shares, strict=True):
        assert list(SkipBatchSampler(shard, skip_batches=7)) == share[7:]


def test_a_clip_beyond_the_bound_stands_alone():
    assert all(len(batch) == 1 for batch in make(max_tokens=1, batches=50))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clips": 0}, "clips must be at least 1, got 0"),
        ({"batches": 0}, "batches must be at least 1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"window": 7}, "window must be at least 8, got 7"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
