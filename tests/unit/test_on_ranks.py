"""What ranks do together: each returns the result or raises the error that all agree on.

The ranks are threads here, and objects travel between them by pickle, as in torch.distributed.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from sgtm.distributed import on_ranks


class Group:
    """The four calls of torch.distributed that are used, for ranks that are threads."""

    def __init__(self, size: int):
        self.size, self.own = size, threading.local()
        self.slots = [b""] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def get_rank(self) -> int:
        return self.own.rank

    def get_world_size(self) -> int:
        return self.size

    def all_gather_object(self, objects: list, mine: object) -> None:
        self.slots[self.own.rank] = pickle.dumps(mine)
        self.barrier.wait()
        objects[:] = map(pickle.loads, self.slots)
        self.barrier.wait()

    def broadcast_object_list(self, objects: list) -> None:
        everyone: list = []
        self.all_gather_object(everyone, objects)
        objects[:] = everyone[0]


@pytest.fixture
def with_ranks(monkeypatch):
    """Call a function of the rank on every rank; returns what each has returned, or the ValueError that it raised."""

    def run(size: int, function: Callable[[int], object]) -> list:
        group = Group(size)
        monkeypatch.setattr(on_ranks, "dist", group)

        def on(rank: int) -> object:
            group.own.rank = rank
            try:
                return function(rank)
            except ValueError as error:
                return error

        with ThreadPoolExecutor(size) as threads:
            return list(threads.map(on, range(size)))

    return run


def test_rank_zero_acts_alone_and_all_have_its_result(with_ranks):
    acted = []

    def act(rank: int) -> str:
        acted.append(rank)
        return f"of rank {rank}"

    assert with_ranks(3, lambda rank: on_ranks.on_rank_zero(lambda: act(rank))) == ["of rank 0"] * 3
    assert acted == [0]


def refuse(rank: int) -> int:
    if rank:
        raise ValueError(f"rank {rank} refuses")
    return rank


def test_an_error_of_rank_zero_is_one_of_all(with_ranks):
    errors = with_ranks(3, lambda rank: on_ranks.on_rank_zero(lambda: refuse(7)))
    assert [(str(error), error.rank) for error in errors] == [("rank 7 refuses", 0)] * 3


def test_results_of_every_rank_are_in_order_of_rank(with_ranks):
    assert with_ranks(3, lambda rank: on_ranks.on_every_rank(lambda: 10 * rank)) == [[0, 10, 20]] * 3
    assert with_ranks(3, lambda rank: on_ranks.together(lambda: 10 * rank)) == [0, 10, 20]


def test_of_several_errors_all_raise_the_lowest_ranks(with_ranks):
    for action in (on_ranks.on_every_rank, on_ranks.together):
        errors = with_ranks(3, lambda rank, action=action: action(lambda: refuse(rank)))
        assert [(str(error), error.rank) for error in errors] == [("rank 1 refuses", 1)] * 3


def test_other_settings_than_those_of_rank_zero_are_an_error_of_all(with_ranks):
    settings = [{"a": 1}, {"a": 1}, {"a": 1, "b": 2}]
    assert with_ranks(2, lambda rank: on_ranks.check_same(lambda: settings[rank])) == [None, None]
    errors = with_ranks(3, lambda rank: on_ranks.check_same(lambda: settings[rank]))
    assert all(str(error).startswith("rank 2 on ") and error.rank == 0 for error in errors)
    assert all(" has b 2, but rank 0 on " in str(error) and " has None; start" in str(error) for error in errors)
