"""Samples of timed steps; tests/processes/test_bench.py takes rounds."""

from __future__ import annotations

import numpy as np

from sgtm.measure import rounds
from sgtm.measure.rounds import PEAKS, LocalStep, Rounds, Sample, Took, described, take_rounds


def test_a_mean_of_steps_weighs_times_and_tokens_and_has_the_largest_memory():
    one = Sample(np.array([1.0, 2.0]), np.array([0.5, 1.0]), 100, 7.0)
    other = Sample(np.array([3.0, 6.0]), np.array([1.5, 3.0]), 200, 5.0)
    mean = Sample.mean([0.75, 0.25], [one, other])
    assert mean.wall.tolist() == [1.5, 3.0] and mean.cpu.tolist() == [0.75, 1.5]
    assert (mean.tokens, mean.peak) == (125.0, 7.0)


def test_a_sample_has_an_item_for_each_round_and_the_median_of_memory():
    taken = Rounds({"a": [Took(1.0, 0.5), Took(2.0, 0.25)]}, {"a": [1.0, 2.0, 9.0]})
    sample = taken.sample("a", 64)
    assert (sample.wall.tolist(), sample.cpu.tolist()) == ([1.0, 2.0], [0.5, 0.25])
    assert (sample.tokens, sample.peak) == (64, 2.0)


class Counting:
    """A step that fails from its call number `until` on."""

    def __init__(self, until: int = 1000):
        self.until, self.steps, self.peaks = until, 0, 0

    def step(self) -> Took:
        self.steps += 1
        if self.steps > self.until:
            raise MemoryError("too large\nfor this machine")
        return Took(float(self.steps), 0.0)

    def peak(self) -> float:
        self.peaks += 1
        return 0.0


def test_warm_up_is_not_measured_and_memory_takes_rounds_of_its_own(monkeypatch):
    monkeypatch.setattr(rounds.torch.cuda, "is_available", lambda: False)
    step = Counting()
    taken = take_rounds({"a": step}, 9, warm_up=2)
    assert [took.wall for took in taken.took["a"]] == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]
    assert (step.steps, step.peaks) == (11, PEAKS)


def test_a_step_that_has_failed_is_not_taken_again_and_the_others_are():
    broken, whole = Counting(until=2), Counting()
    taken = take_rounds({"broken": broken, "whole": whole}, 4, may_fail=["broken"])
    assert (broken.steps, broken.peaks, len(taken.took["whole"])) == (3, 0, 4)
    assert taken.failed == {"broken": "MemoryError: too large"} and len(taken.took["broken"]) == 1


def test_an_error_is_described_in_one_line():
    assert described(ValueError()) == "ValueError: " and len(described(ValueError("x" * 999))) == 312


def test_a_step_of_this_process_is_timed_around_its_call(monkeypatch):
    clock = {"wall": 10.0, "cpu": 1.0}
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(rounds.time, "process_time", lambda: clock["cpu"])
    monkeypatch.setattr(rounds, "wait_for_device", lambda: clock.update(wall=clock["wall"] + 1.0))
    assert LocalStep(lambda: clock.update(wall=clock["wall"] + 4.0, cpu=3.0)).step() == Took(5.0, 2.0)
