"""Which wandb run a directory writes to, and which lines: copies, moves, resumes; wandb itself is stubbed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_config

from sgtm.run.metrics import MetricsLog
from sgtm.run.wandb_id import claim

STEP = {"seconds": 1.0, "loss": 2.0, "tokens_per_second": 3.0}


def claimed(run: Path) -> tuple[str, list[str]]:
    lines: list[str] = []
    return claim(run, [], lines.append)[0], lines


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "one").mkdir()
    return tmp_path / "one"


def test_a_copy_gets_an_id_of_its_own_and_keeps_it(run: Path):
    first, lines = claimed(run)
    shutil.copytree(run, copy := run.with_name("copy"))
    assert lines == [] and claimed(run) == (first, [])
    second, lines = claimed(copy)
    assert second != first and lines == [f"{copy} is a copy of {run}: it gets a wandb run of its own"]
    assert claimed(copy) == (second, []) and claimed(run) == (first, [])


def test_a_copy_of_a_copy_and_the_original_resumed_last(run: Path):
    first, _ = claimed(run)
    copies = [run.with_name("b"), run.with_name("c")]
    for copy in copies:
        shutil.copytree(run, copy)
    assert len({first, *(claimed(copy)[0] for copy in copies), claimed(run)[0]}) == 3


def test_a_run_that_is_moved_or_linked_keeps_its_id(run: Path):
    first, _ = claimed(run)
    (link := run.with_name("link")).symlink_to(run)
    assert claimed(link) == (first, [])
    link.unlink()
    moved = run.rename(run.with_name("moved"))
    assert claimed(moved) == (first, [])
    again = moved.rename(moved.with_name("again"))
    moved.mkdir()  # another run in the old place
    claimed(moved)
    assert claimed(again) == (first, [])


def test_a_file_of_an_older_version_and_a_damaged_one(run: Path):
    (run / "wandb.id").write_text("1a2b3c4d\n")
    assert claimed(run) == ("1a2b3c4d", []) == claimed(run)
    (run / "wandb.id").write_text("{")
    with pytest.raises(ValueError, match=r"wandb.id is damaged; put back a copy, or delete it"):
        claimed(run)


@pytest.fixture
def sent(monkeypatch) -> list[tuple]:
    """(id, step, kind) of what wandb is sent."""
    rows: list[tuple] = []

    def init(**options):
        def log(numbers: dict, step: int) -> None:
            rows.append((options["id"], step, "step" if "loss" in numbers else "eval"))

        return SimpleNamespace(log=log, finish=lambda exit_code: None)

    stub = SimpleNamespace(init=init, Settings=lambda **options: options, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return rows


def train(run: Path, start: int, steps: int) -> None:
    """Steps `start + 1` to `steps`, with evaluations after even ones; killed after the line of the last step."""
    log = MetricsLog(run, tiny_config(wandb={"mode": "offline"}), rank=0, start=start)
    evaluated = log.open()
    with log:
        if start and start not in evaluated:
            log.evaluation(start, {"full": {"en": 1.0}}, {}, {})
        for step in range(start + 1, steps + 1):
            log.step({**STEP, "step": step})
            if step % 2 == 0 and step < steps:
                log.evaluation(step, {"full": {"en": 1.0}}, {}, {})


def test_every_line_is_sent_once_however_often_the_run_is_killed(run: Path, sent: list[tuple]):
    train(run, 0, 8)
    train(run, 4, 6)  # killed again, before it had come as far
    train(run, 4, 10)
    train(run, 10, 12)
    steps = [step for _, step, kind in sent if kind == "step"]
    assert steps == list(range(1, 13)) and len({run_id for run_id, _, _ in sent}) == 1
    assert [step for _, step, kind in sent if kind == "eval"] == [2, 4, 6, 8, 10]
    assert json.loads((run / "wandb.id").read_text())["logged"] == {"step": 10, "eval": 8}


def test_a_copy_that_is_resumed_sends_its_own_steps(run: Path, sent: list[tuple]):
    train(run, 0, 8)
    shutil.copytree(run, copy := run.with_name("copy"))
    sent.clear()
    train(copy, 4, 9)
    assert [step for _, step, kind in sent if kind == "step"] == [5, 6, 7, 8, 9]
