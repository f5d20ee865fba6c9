"""Lines about the runs of a sweep; tests/processes/test_sweep_run.py has the remaining time."""

from __future__ import annotations

import io
import signal
from pathlib import Path

import pytest
from rich.console import Console
from sweeps import step, sweep_of, write_run

from sgtm.estimate.shapes import parameter_sizes
from sgtm.sweep.progress import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(40.4, "40 s"), (99, "99 s"), (100, "2 min"), (720, "12 min"), (6000, "1.7 h"), (12_240, "3.4 h")],
)
def test_a_duration_has_the_unit_that_suits_it(seconds, expected):
    assert duration(seconds) == expected


def test_a_run_is_announced_when_it_starts_and_when_it_ends(tmp_path: Path):
    sweep = sweep_of(tmp_path, "variants: {a: , b: , c: , d: }")
    a, b, c, d = sweep.runs
    write_run(b, step(1), step(2))
    console = Console(width=120, file=io.StringIO())
    with Progress(list(sweep.runs), [a], console) as shown:
        for run in (b, c, d):
            shown.started(run)
        write_run(b, step(4))
        shown.ended(b, True, 0)
        write_run(c, step(3))
        shown.ended(c, False, 128 + signal.SIGTERM)
        shown.ended(d, False, 1)
    assert console.file.getvalue().splitlines() == [
        "started b-s0 from step 2",
        "started c-s0",
        "started d-s0",
        "finished b-s0 (2 of 4 runs finished)",
        "stopped at step 3: c-s0 (2 of 4 runs finished)",
        "failed at step 0: d-s0 (2 of 4 runs finished)",
    ]


def test_a_step_of_a_larger_model_is_more_of_the_whole(tmp_path: Path):
    small, large = sweep_of(tmp_path, "variants: {small: , large: {model.layers: 4}}").runs
    shown = Progress([small, large], [])
    assert shown.work[small.name] == 512 * sum(parameter_sizes(small.config).values()) < shown.work[large.name]
