"""Training the runs of a sweep, with processes that are none: who starts when, and what a signal does."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import pytest
from rich.console import Console
from sweeps import evaluation, step, sweep_of, write_run

from sgtm.config import load_config
from sgtm.sweep import schedule
from sgtm.sweep.progress import Progress
from sgtm.sweep.schedule import Room, Stop, arguments_of, train_all


class Processes:
    """Starts processes that end at their second poll: of these runs with a status and unfinished, of others whole."""

    def __init__(self, sweep, statuses: dict[str, int]):
        self.runs, self.statuses = {run.name: run for run in sweep.runs}, statuses
        self.events: list[str] = []
        self.devices: dict[str, str | None] = {}

    def start(self, arguments: list[str], environment: dict[str, str], log: Path):
        return Process(self, Path(arguments[1]).stem, environment)


class Process:
    def __init__(self, all_: Processes, name: str, environment: dict[str, str]):
        self.all, self.name, self.polls, self.pid = all_, name, 0, 1000 + len(all_.devices)
        all_.events.append(f"+{name}")
        all_.devices[name] = environment.get("CUDA_VISIBLE_DEVICES")

    def poll(self) -> int | None:
        self.polls += 1
        if self.polls < 2:
            return None
        self.all.events.append(f"-{self.name}")
        status = self.all.statuses.get(self.name, 0)
        write_run(self.all.runs[self.name], step(4), *([] if status else [evaluation(4, {"full": {"en": 1.0}})]))
        return status


@pytest.fixture
def sweep(tmp_path: Path):
    return sweep_of(tmp_path, "variants: {a: , b: , c: }")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(schedule.time, "sleep", lambda seconds: None)


def train(sweep, processes: Processes, room: Room):
    with Progress(list(sweep.runs), [], Console(quiet=True)) as progress:
        return train_all(sweep, list(sweep.runs), room, progress, processes.start)


def test_a_run_that_fails_does_not_stop_the_others(sweep):
    processes = Processes(sweep, {"a-s0": 3})
    outcome = train(sweep, processes, Room(1, None, math.inf))
    assert processes.events == ["+a-s0", "-a-s0", "+b-s0", "-b-s0", "+c-s0", "-c-s0"]
    assert outcome.failed == [(sweep.runs[0], 3)] and outcome.stopped is None


def test_a_run_takes_the_device_of_one_that_has_ended(sweep):
    processes = Processes(sweep, {})
    train(sweep, processes, Room(2, None, math.inf, ("4", "6")))
    assert processes.events[:3] == ["+a-s0", "+b-s0", "-a-s0"]
    assert processes.devices == {"a-s0": "4", "b-s0": "6", "c-s0": "4"}


def test_a_signal_is_passed_on_and_no_run_starts_after_it(sweep, monkeypatch):
    sent = []
    monkeypatch.setattr(schedule.os, "kill", lambda pid, number: sent.append((pid, number)))
    processes = Processes(sweep, {"a-s0": 143})
    start = processes.start

    def signalled(*arguments) -> Process:
        signal.raise_signal(signal.SIGUSR1)
        return start(*arguments)

    monkeypatch.setattr(processes, "start", signalled)
    outcome = train(sweep, processes, Room(2, None, math.inf))
    assert sent == [(1000, signal.SIGTERM)] and processes.events == ["+a-s0", "-a-s0"]
    assert outcome.stopped == signal.SIGUSR1 and outcome.failed == [], "a run that is stopped has not failed"


def test_a_second_ctrl_c_kills_and_a_second_sigterm_does_not():
    before = signal.getsignal(signal.SIGTERM)
    for numbers, expected in (
        ((signal.SIGINT, signal.SIGINT), [signal.SIGTERM, signal.SIGKILL]),
        ((signal.SIGTERM, signal.SIGTERM), [signal.SIGTERM, signal.SIGTERM]),
    ):
        with Stop() as stop:
            assert stop.signal is None and stop.news() == []
            for number in numbers:
                signal.raise_signal(number)
            assert stop.news() == expected and stop.news() == [] and stop.signal == numbers[0]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_is_trained_or_resumed_by_its_config(sweep):
    run = sweep.runs[1]
    command, file, resume = arguments_of(sweep, run)
    assert (command, resume) == ("train", "--resume") and Path(file) == sweep.folder / "configs" / "b-s0.yaml"
    assert load_config(file) == run.config
