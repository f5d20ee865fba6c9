"""The table of a sweep: four losses of a run, their means and spreads, and how they are written."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from sweeps import evaluation, step, sweep_of, write_run

from sgtm.model.transformer import Transformer
from sgtm.sweep import table
from sgtm.sweep.table import LOSSES, Row, losses_of, print_table, read_rows, write_table

LABELS = {"en": "retain", "web": "unlabeled", "es": "forget:es"}
FOUND = {"full": {"en": 1.0, "web": 2.0, "es": 4.0}, "without es": {"en": 1.5, "web": 2.5, "es": 8.0}}


@pytest.fixture
def sweep(tmp_path: Path):
    return sweep_of(tmp_path, "variants: {a: , b: }\nseeds: [0, 1, 2]")


def test_a_category_that_no_domain_owns_counts_as_retained(sweep):
    assert losses_of(FOUND, LABELS, sweep.runs[0]) == {
        "full_retain": 1.5, "full_forget": 4.0, "ablated_retain": 2.0, "ablated_forget": 8.0,
    }  # fmt: skip
    nothing_forgotten = {name: {"en": 1.0} for name in FOUND}
    losses = losses_of(nothing_forgotten, LABELS, sweep.runs[0])
    assert losses["full_retain"] == 1.0 and math.isnan(losses["full_forget"])


def test_adjacent_categories_have_losses_of_their_own(sweep):
    assert losses_of(FOUND, LABELS, sweep.runs[0], ["web"]) == {
        "full_retain": 1.0, "full_adjacent": 2.0, "full_forget": 4.0,
        "ablated_retain": 1.5, "ablated_adjacent": 2.5, "ablated_forget": 8.0,
    }  # fmt: skip


def test_a_table_has_columns_for_adjacent_categories_where_the_sweep_names_some(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "trained_tokens", lambda corpus, config: TRAINED)
    sweep = sweep_of(tmp_path, "variants: {a: }\nadjacent: [web]")
    write_run(sweep.runs[0], step(4), evaluation(4, FOUND))
    rows = read_rows(sweep, {sweep.runs[0].name: SimpleNamespace(categories=LABELS)})
    write_table(sweep, rows)
    (record,) = map(json.loads, (sweep.folder / "table.jsonl").read_text().splitlines())
    assert (record["ablated_adjacent"], record["ablated_retain"]) == (2.5, 1.5)
    assert record["seeds"][0]["evaluations"][0]["full_adjacent"] == 2.0
    assert "ablated_adjacent_sd" in (sweep.folder / "table.csv").read_text().splitlines()[0]
    print_table(rows, Console(width=140))
    printed = capsys.readouterr().out
    assert printed.count("adjacent") == 3 and "unlabeled ones too, adjacent ones not" in printed


def test_spread_is_that_of_a_sample_and_needs_two_finite_losses(sweep):
    runs = sweep.runs[:1]

    def row(*losses: float) -> Row:
        return Row("a", runs, {str(n): {"full_retain": loss} for n, loss in enumerate(losses)}, {})

    assert (row(1.0, 3.0).mean("full_retain"), row(1.0, 3.0).spread("full_retain")) == (2.0, math.sqrt(2))
    assert (row(5.0).mean("full_retain"), row(5.0).spread("full_retain")) == (5.0, None)
    assert (row().mean("full_retain"), row().spread("full_retain")) == (None, None)
    assert math.isnan(row(1.0, math.nan).spread("full_retain"))


TRAINED = {"retain": {"unlabeled": 1024.0}}


@pytest.fixture
def rows(sweep, monkeypatch) -> list[Row]:
    """Of `a` two seeds are finished, of which one has a loss that is not finite; of `b` none."""
    monkeypatch.setattr(table, "trained_tokens", lambda corpus, config: TRAINED)
    for run in sweep.runs:
        norms = {"retain": {"residual": [1.0, run.seed + 7.0]}, "forget:es": {"residual": [1.0, None]}}
        write_run(run, step(4))
        if run.variant == "a" and run.seed < 2:
            full = {**FOUND["full"], "en": None} if run.seed else FOUND["full"]
            write_run(run, step(4) | {"norms": norms}, step(4), evaluation(4, FOUND | {"full": full}))
    corpus = SimpleNamespace(categories=LABELS)
    return read_rows(sweep, dict.fromkeys((run.name for run in sweep.runs), corpus))


def test_a_variant_has_the_losses_of_its_finished_runs(rows):
    assert [(row.variant, len(row.runs), list(row.losses)) for row in rows] == [
        ("a", 3, ["a-s0", "a-s1"]),
        ("b", 3, []),
    ]
    assert rows[0].tokens == 4 * 512 and rows[0].categories["a-s0"] == FOUND
    assert rows[0].mean("ablated_retain") == 2.0 and math.isnan(rows[0].mean("full_retain"))


def test_files_have_null_or_nothing_for_what_is_not_finite(sweep, rows):
    sweep.folder.mkdir(parents=True, exist_ok=True)
    write_table(sweep, rows)
    a, b = map(json.loads, (sweep.folder / "table.jsonl").read_text().splitlines())
    assert (a["finished"], a["full_retain"], a["full_forget"], a["full_forget_sd"]) == (2, None, 4.0, 0.0)
    first, second = a["seeds"]
    assert (first["run"], first["seed"], first["full_retain"], first["losses"]) == ("a-s0", 0, 1.5, FOUND)
    assert a["trained"] == TRAINED and b["trained"] == {} and a["masks"] is True
    config = sweep.runs[0].config
    model = Transformer(config.model, config.partition)
    assert a["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert a["settings"]["train.steps"] == 4 and not {"name", "runs"} & set(a["settings"])
    assert first["evaluations"] == [{"tokens": 2048, **{loss: first[loss] for loss in LOSSES}}]
    assert second["evaluations"][0]["full_retain"] is None and second["residual"] == {"retain": 8.0}
    assert second["full_retain"] is None and b["seeds"] == []
    a, b = csv.DictReader((sweep.folder / "table.csv").read_text().splitlines())
    assert (a["full_retain"], a["full_forget"], a["tokens"]) == ("", "4.0", "2048")
    assert [b[name] for name in LOSSES] == [""] * 4


def test_the_printed_table_shows_how_many_runs_are_finished(rows):
    console = Console(width=120, record=True, file=io.StringIO())
    print_table(rows, console)
    a, b = [line.split() for line in console.export_text().splitlines() if line.split()[:1] in (["a"], ["b"])]
    assert " ".join(a) == "a 2 of 3 2,048 nan ± nan 4.000 ± 0.000 2.000 ± 0.000 8.000 ± 0.000"
    assert " ".join(b) == "b 0 of 3 2,048 - - - -"
