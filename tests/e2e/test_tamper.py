"""`sgtm tamper` on runs of the debug preset: curves beside a control, the same bits again, and refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 3
GRID = ("--steps", "1", "2", "--lr", "1", "10", "--data", "forget", "--tokens", "128", "--sequences", "4")


def sgtm(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sgtm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """`mine`, and `filtered`, which never saw the domain."""
    runs = tmp_path_factory.mktemp("runs")
    unmasked = ("--masking.strategy=none", "--data.channel={}")
    for name, options in {"mine": (), "filtered": (*unmasked, "--data.upsample={es: 0}")}.items():
        done = sgtm("train", "debug", f"--runs={runs}", f"--name={name}", f"--train.steps={STEPS}", *options)
        assert done.returncode == 0, done.stderr
    return runs


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "tamper.jsonl").read_text().splitlines()]


def test_curves_beside_a_control_and_the_same_bits_again(runs):
    mine, filtered = runs / "mine", runs / "filtered"
    first = sgtm("tamper", mine, *GRID, "--against", filtered, "--baseline", filtered)
    assert first.returncode == 0, first.stderr
    table = first.stdout[first.stdout.index("mine (without es): lowest") :]
    assert "difference: from filtered (full) under the same attacks" in table
    assert "mine (without es) " in table and "the loss of filtered (full)" in table
    assert [row["step"] for row in rows_of(mine)] == [0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 0, 1, 2]
    assert [row["attack"] for row in rows_of(mine)] == [row["attack"] for row in rows_of(filtered)]
    assert {row["condition"] for row in rows_of(filtered)} == {"full"}
    contents = [(run / "tamper.jsonl").read_bytes() for run in (mine, filtered)]

    (mine / "tamper.jsonl").write_bytes(b"".join(contents[0].splitlines(keepends=True)[:6]))  # as after a kill
    continued = sgtm("tamper", mine, *GRID, "--against", filtered, "--baseline", filtered)
    assert continued.stdout.endswith(table) and continued.stdout.count("attack ") < first.stdout.count("attack ")
    again = sgtm("tamper", mine, *GRID, "--against", filtered, "--baseline", filtered, "--again")
    assert again.stdout == first.stdout
    assert [(run / "tamper.jsonl").read_bytes() for run in (mine, filtered)] == contents


def test_what_cannot_be_attacked_is_refused_before_anything_is_trained(runs, tmp_path):
    run = tmp_path / "mine"
    shutil.copytree(runs / "mine", run, ignore=shutil.ignore_patterns("tamper.jsonl"))
    data = f"--data.path={runs / 'synthetic-512'}"
    refusals = [
        (("--data.path=gone",), "no corpus at gone"),
        ((data, "--domain", "bio"), f"{run} has no domain 'bio'; it has es"),
        ((data, "--adjacent", "fr"), "no category 'fr'; its categories are en and es"),
        ((data, "--tokens", "100"), "--tokens 100: a step of forget takes a multiple of model.context, 64 tokens"),
        ((data, "--against", tmp_path), "error: "),
    ]
    for options, message in refusals:
        done = sgtm("tamper", run, *options)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    shutil.rmtree(run / "checkpoints")
    done = sgtm("tamper", run, data)
    assert done.returncode == 2 and "has no checkpoint yet; train first" in done.stderr
    assert not (run / "tamper.jsonl").exists()
