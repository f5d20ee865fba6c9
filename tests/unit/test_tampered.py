"""Tamper curves of the runs in a folder: named by variant and method, the worst case at every step."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sgtm.config.load import load_config, save_config
from sgtm.evaluation.tampering import Attack, Reached
from sgtm.run.adapted import write_adapted
from sgtm.run.tampering import AttackGrid
from sgtm.run.unlearned import write_unlearned
from sgtm.sweep import tampered
from sgtm.sweep.tampered import tamper_rows

GENTLE, HARD = (Attack("forget", (("es",),), lr, "constant", 4, 0, 100, (0, 2, 4)) for lr in (1e-3, 1e-2))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run of a sweep with seed 3, and one that was unlearned from it."""
    for name in ("paper-s3", "rmu-of-it", "untouched"):
        run = tmp_path / name
        run.mkdir()
        save_config(load_config("debug", ["--train.seed", "3"]), run / "config.yaml")
        if name != "untouched":
            (run / "tamper.jsonl").touch()
    record = {"options": {}, "domain": "es", "method": "rmu", "steps": 1, "lr": 1.0, "seed": 0}
    write_unlearned(tmp_path / "rmu-of-it", record | {"source": {"run": "unmasked-s3", "step": 9}})
    reached = [Reached(GENTLE, 0, 9.0, 0.1, 3.0), Reached(GENTLE, 2, 8.0, 0.1, 3.5), Reached(GENTLE, 4, 7.0, 0.1, 3.5)]
    reached += [Reached(HARD, 0, 9.0, 0.1, 3.0), Reached(HARD, 2, 7.5, 0.2, 4.0), Reached(HARD, 4, 9.5, 0.2, 5.0)]
    monkeypatch.setattr(tampered, "read_grids", lambda run: {"without es": AttackGrid(9, reached)})
    return tmp_path


def test_rows_have_the_worst_case_by_variant_and_seed(folder):
    reached = tampered.read_grids(folder)["without es"].reached
    paper, rmu = tamper_rows(folder)
    assert (paper["tampered"], paper["seed"], paper["condition"], paper["sequences"]) == ("paper", 3, "without es", 9)
    assert [(p["step"], p["tokens"], p["forget"], p["error"], p["retain"]) for p in paper["curve"]] == [
        (0, 0, 9.0, 0.1, 3.0),
        (2, 200, 7.5, 0.2, 4.0),
        (4, 400, 7.0, 0.1, 3.5),
    ]
    assert paper["tokens"] == 100
    assert paper["attacks"] == {
        str(GENTLE): [(0, 9.0), (2, 8.0), (4, 7.0)],
        str(HARD): [(0, 9.0), (2, 7.5), (4, 9.5)],
    }
    longer = replace(GENTLE, steps=8, evaluated=(0, 2, 8))
    other = replace(longer, warmup=2)
    more = [Reached(longer, 0, 9.0, 0.1, 3.0), Reached(longer, 2, 8.0, 0.1, 3.5), Reached(longer, 8, 6.0, 0.1, 3.5)]
    reached.extend([*more, Reached(other, 2, 8.5, 0.1, 3.5)])
    assert tamper_rows(folder)[0]["attacks"] == paper["attacks"] | {
        str(GENTLE): [(0, 9.0), (2, 8.0), (4, 7.0), (8, 6.0)],
        str(other): [(2, 8.5)],
    }, "the same attack for more steps, and one of another warm-up"
    reached.append(Reached(other, 4, float("nan")))
    assert tamper_rows(folder)[0]["attacks"][str(other)] == [(2, 8.5)], "a loss that is not finite"
    assert (rmu["tampered"], rmu["seed"], rmu["curve"]) == ("unmasked + rmu", 3, paper["curve"])


def test_an_adapted_run_is_named_by_its_source(folder):
    options = {"rank": 2, "alpha": 4.0}
    record = {"options": options, "domain": "es", "steps": 1, "lr": 1.0, "seed": 0, "seen": False}
    (folder / "rmu-of-it/unlearned.json").unlink()
    write_adapted(folder / "rmu-of-it", record | {"source": {"run": "filtered-s3", "step": 9}})
    assert [row["tampered"] for row in tamper_rows(folder)] == ["paper", "filtered + adapters"]


def test_the_seed_is_taken_from_the_end_of_the_name_and_no_two_runs_have_one_name(folder):
    for old, new in (("paper-s3", "a-s12-s1"), ("untouched", "rmu-again")):
        (folder / old).rename(folder / new)
    (folder / "rmu-again" / "tamper.jsonl").touch()
    record = json.loads((folder / "rmu-of-it" / "unlearned.json").read_text())
    write_unlearned(folder / "rmu-again", record | {"lr": 2.0})
    names = [(row["tampered"], row["seed"]) for row in tamper_rows(folder)]
    assert names == [("a-s12", 1), ("rmu-again", 3), ("rmu-of-it", 3)]


def test_a_run_whose_attacks_all_failed_has_no_row(folder, monkeypatch):
    monkeypatch.setattr(tampered, "read_grids", lambda run: {"full": AttackGrid(9, [Reached(HARD, 0, float("nan"))])})
    assert tamper_rows(folder) == []
