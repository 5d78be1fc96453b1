"""A process knows its place, and the GPU that is its own."""

import re

import pytest
import torch

from bridge_stg.distributed import check_rendezvous, own_device, rank_and_size
from bridge_stg.errors import ConfigError


def test_the_place_is_the_launchers(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert rank_and_size() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert rank_and_size() == (3, 8)


@pytest.mark.parametrize(
    ("rank", "size", "message"),
    [
        ("8", "8", "RANK must be below WORLD_SIZE, got 8 of 8"),
        ("3", None, "RANK must be below WORLD_SIZE, got 3 of 1"),
        ("-1", "8", "RANK must be an integer >= 0, got '-1'"),
        ("one", "8", "RANK must be an integer >= 0, got 'one'"),
        ("", "8", "RANK must be an integer >= 0, got ''"),
        ("²", "8", "RANK must be an integer >= 0, got '²'"),
        ("9" * 5000, "8", "RANK must be an integer >= 0, got '999"),
        ("0", "0", "WORLD_SIZE must be an integer >= 1, got '0'"),
        ("0", "2.5", "WORLD_SIZE must be an integer >= 1, got '2.5'"),
    ],
)
def test_a_place_that_cannot_be(monkeypatch, rank, size, message):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ConfigError, match=re.escape(message)):
        rank_and_size()


@pytest.mark.parametrize("value", ["-1", "gpu", ""])
def test_a_local_rank_that_cannot_be(monkeypatch, value):
    monkeypatch.setenv("LOCAL_RANK", value)
    with pytest.raises(ConfigError, match="LOCAL_RANK must be an integer >= 0"):
        own_device("cpu")
    with pytest.raises(ConfigError, match="LOCAL_RANK must be an integer >= 0"):
        rank_and_size()


RENDEZVOUS = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        (dict.fromkeys(RENDEZVOUS), None),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": None, "MASTER_ADDR": None}, None),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT must be an integer >= 1, got 'abc'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT must be an integer <= 65535, got 65536"),
        ({**dict.fromkeys(RENDEZVOUS), "LOCAL_RANK": "0"}, "RANK is not set"),
    ],
)
def test_what_processes_find_each_other_by(monkeypatch, changes, message):
    for name, value in (RENDEZVOUS | changes).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    if message is None:
        check_rendezvous()
    else:
        with pytest.raises(ConfigError, match=message):
            check_rendezvous()


def machine(monkeypatch, gpus, local_rank=None):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))


@pytest.mark.parametrize(
    ("gpus", "local_rank", "name", "expected"),
    [
        (0, 1, "auto", "cpu"),
        (2, 1, "cpu", "cpu"),
        (2, None, "auto", "cuda:0"),
        (2, 1, "auto", "cuda:1"),
        (2, 1, "cuda", "cuda:1"),
    ],
)
def test_every_process_has_a_gpu_of_its_own(monkeypatch, gpus, local_rank, name, expected):
    machine(monkeypatch, gpus, local_rank)
    assert own_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("gpus", "local_rank", "name", "message"),
    [
        (0, None, "cuda", "Process 0 of this machine has no GPU of its own: torch sees 0"),
        (2, 2, "auto", "Process 2 of this machine has no GPU of its own: torch sees 2"),
        (0, None, "tpu", "device must be one of auto, cpu, cuda, got 'tpu'"),
    ],
)
def test_what_cannot_be_is_one_sentence(monkeypatch, gpus, local_rank, name, message):
    machine(monkeypatch, gpus, local_rank)
    with pytest.raises(ConfigError, match=message):
        own_device(name)
