"""One model in several threads: every answer is to the bit that of one thread."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch

from bridge_stg.data import SyntheticTubes
from bridge_stg.models import load_model

THREADS = 8


@pytest.fixture(scope="module")
def requests():
    data = SyntheticTubes("test", seed=3, count=4, size=(64, 64), frame_count=8)
    return [(data[i].render()[: 8 - i], data[i].sentence) for i in range(4)]


def ground(model, request):
    frames, sentence = request
    times = (np.arange(len(frames)) / 4).tolist()
    (found,) = model.predict([frames], [times], [sentence], durations=[len(frames) / 4])
    return found


def same(a, b):
    return (
        (a.answer, a.interval, a.interval_source) == (b.answer, b.interval, b.interval_source)
        and np.array_equal(a.presence, b.presence)
        and np.array_equal(a.boxes, b.boxes)
        and all(np.array_equal(x, y) for p, q in zip(a.kept, b.kept, strict=True) for x, y in zip(p, q, strict=True))
    )


def test_threads_that_begin_with_a_fresh_model_get_the_answers_of_one(requests):
    """The first passes too: what is made lazily, such as hooks and caches, is made by all of them at once."""
    model, together = load_model(), Barrier(THREADS)

    def work(thread):
        together.wait()
        return [(place, ground(model, requests[place])) for k in range(4) for place in [(thread + k) % 4]]

    with ThreadPoolExecutor(THREADS) as pool:
        found = [pair for pairs in pool.map(work, range(THREADS)) for pair in pairs]
    alone = [ground(model, request) for request in requests]
    assert len(found) == 4 * THREADS
    assert all(same(answer, alone[place]) for place, answer in found)


def test_a_training_pass_beside_it_changes_no_answer(requests, make_model, batch):
    """Gradients are on in one thread and off in another; a pass in training mode belongs to another model."""
    model, trained = load_model(), make_model().train()
    inputs, _ = batch
    alone = [ground(model, request) for request in requests]

    def train(_):
        return torch.stack([trained(**inputs).boxes.sum() for _ in range(2)]).sum().requires_grad

    with ThreadPoolExecutor(4) as pool:
        graded = pool.map(train, range(2))
        found = list(pool.map(lambda request: ground(model, request), requests))
        assert all(graded)
    assert all(same(a, b) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_which_loading_switches_for_all_threads_changes_no_answer(requests, dtype):
    model = load_model()
    alone = ground(model, requests[0])
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = ground(model, requests[0])
    finally:
        torch.set_default_dtype(before)
    assert same(found, alone)


def test_models_that_load_at_once_leave_torch_as_it_was():
    before, weights = torch.nn.init.zeros_, load_model().state_dict()
    with ThreadPoolExecutor(THREADS) as pool:
        loaded = list(pool.map(lambda _: load_model().state_dict(), range(THREADS)))
    assert torch.nn.init.zeros_ is before and torch.get_default_dtype() == torch.float32
    assert all(torch.equal(found[name], p) for found in loaded for name, p in weights.items())
