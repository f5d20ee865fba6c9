"""The warning where other programs take the cores."""

from __future__ import annotations

import time

import pytest

from sgtm.training.contention import STEPS, ContentionWatch


def warnings(monkeypatch, share: float, threads: int = 2, policy: str = "") -> list[str]:
    """What is printed over ten steps of a second in which the main thread has a core for this share."""
    clock = {"wall": 0.0}
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    monkeypatch.setattr(time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(time, "thread_time", lambda: clock["wall"] * share)
    watch, printed = ContentionWatch(threads), []
    for step in range(1, 11):
        with watch.step():
            clock["wall"] += 1.0
        if text := watch.warning():
            printed.append(f"{step}: {text}")
    return printed


def test_a_busy_machine_is_one_warning_with_the_remedy(monkeypatch):
    (text,) = warnings(monkeypatch, 0.2)
    assert text.startswith(
        f"{STEPS}: other programs keep the cores busy: in the first 5 steps the main thread had a core"
    )
    assert "for 20% of the time, and 2 threads" in text and "OMP_WAIT_POLICY=passive" in text
    assert "OMP_NUM_THREADS=1" in text


@pytest.mark.parametrize("quiet", [{"share": 0.95}, {"share": 0.2, "threads": 1}, {"share": 0.2, "policy": "passive"}])
def test_no_warning_where_nothing_is_to_be_gained(monkeypatch, quiet: dict):
    assert warnings(monkeypatch, **quiet) == []
