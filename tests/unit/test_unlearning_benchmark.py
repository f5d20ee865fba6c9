"""The grid of post-hoc unlearning: which setting is chosen, and what its row has."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sgtm.files import sha256_of
from sgtm.run.adapted import write_adapted
from sgtm.run.checkpoint import MANIFEST
from sgtm.run.unlearned import write_unlearned


@pytest.fixture
def unlearning(benchmarks):
    import unlearning

    return unlearning


def setting(retain: float, forget: float) -> dict:
    return {"retain": retain, "forget": forget, "retain_before": 4.0, "forget_before": 4.2}


def test_the_choice_forgets_most_of_those_that_keep_the_retain_loss(unlearning):
    rows = [setting(4.05, 5.0), setting(4.2, 9.0), setting(4.09, 6.0), setting(3.9, 5.5)]
    assert unlearning.choice(rows) is rows[2]
    assert unlearning.choice([setting(4.2, 9.0)]) is None


def test_four_losses_are_means_over_categories(unlearning):
    labels = {"en": "retain", "web": "unlabeled", "es": "forget:es"}
    full, without = {"en": 1.0, "web": 2.0, "es": 3.0}, {"en": 2.0, "web": 4.0, "es": 9.0}
    assert unlearning.four_losses({"full": full}, labels) == {"full_retain": 1.5, "full_forget": 3.0}
    assert unlearning.four_losses({"full": full, "without es": without}, labels) == {
        "full_retain": 1.5, "full_forget": 3.0, "ablated_retain": 3.0, "ablated_forget": 9.0,
    }  # fmt: skip


def test_a_row_is_one_that_the_documents_take(unlearning, benchmarks):
    import experiment_sections

    train = SimpleNamespace(steps=10, tokens_per_step=100)
    runs = [SimpleNamespace(variant="unmasked", config=SimpleNamespace(train=train))] * 2
    seeds = [{"seed": n, "full_retain": 4.0 + n, "full_forget": 6.0 + n} for n in range(2)]
    row = unlearning.row_of(runs, "rmu", seeds, masks=False)
    assert (row["full_retain"], row["ablated_forget"], row["tokens"]) == (4.5, None, 1000)
    text = experiment_sections.tables([row])
    assert "| unmasked + rmu | 2 | 1,000 | 4.500 ± 0.707 | 6.500 ± 0.707 |  |  |" in text


def test_a_grid_is_shown_with_its_choice(benchmarks):
    import experiment_sections

    best = {"method": "rmu", "options": {"alpha": 10.0}, "factor": 3.0, **setting(4.09, 6.0), "chosen": True}
    text = experiment_sections.settings([best, {**best, "factor": 1.0, "chosen": False}])
    assert "before: 4.000 and 4.200" in text and "| rmu | alpha 10 | 3 | 4.090 | 6.000 | yes |" in text
    assert (
        "| rmu | alpha 10 | 1 | 4.090 | 6.000 |  |" in text and experiment_sections.settings([{"variant": "a"}]) == ""
    )


RUNS = [
    SimpleNamespace(
        name=f"unmasked-s{seed}",
        variant="unmasked",
        seed=seed,
        directory=Path(f"runs/unmasked-s{seed}"),
        config=SimpleNamespace(
            train=SimpleNamespace(steps=10, tokens_per_step=100, eval_limit=9), optimizer=SimpleNamespace(lr=2.0)
        ),
    )
    for seed in (0, 1)
]


@pytest.fixture
def measurements(monkeypatch):
    """Runs a benchmark on RUNS; returns what was measured, as (folder, split, sequences), and the rows."""

    def run(module) -> tuple[list[tuple], list[dict]]:
        measured, rows = [], []

        def measure(folder, split, sequences, adjacent=()):
            measured.append((folder.name, split, sequences))
            loss = 6.0 if "x3" in folder.name or "3.0" in folder.name else 5.0
            return {"full_retain": 4.0, "full_forget": loss}

        sweep = SimpleNamespace(runs=RUNS, folder=Path("runs/a.sweep"), adjacent=())
        monkeypatch.setattr(module, "read_sweep", lambda file: sweep)
        monkeypatch.setattr(module, "measured", measure)
        monkeypatch.setattr(module, "write_rows", lambda file, written: rows.extend(written))
        monkeypatch.setattr(sys, "argv", ["benchmark", "a.sweep.yaml", "--sequences", "5", "--json", "rows.jsonl"])
        module.main()
        return measured, rows

    return run


def test_a_setting_is_chosen_on_split_train_and_shown_on_test(unlearning, measurements, monkeypatch):
    monkeypatch.setattr(unlearning, "GRID", {"rmu": [({"alpha": 1.0}, 1.0), ({"alpha": 1.0}, 3.0)]})
    monkeypatch.setattr(unlearning, "apply", lambda run, method, options, factor, out: factor)
    measured, rows = measurements(unlearning)
    tried = ["unmasked-s0", "unmasked-s0-rmu-1-x1", "unmasked-s0-rmu-1-x3"]
    chosen = ["unmasked-s0-rmu", "unmasked-s1-rmu"]
    assert measured == [(name, "train", 5) for name in tried] + [(name, "test", 9) for name in chosen]
    assert [row["chosen"] for row in rows if "chosen" in row] == [False, True]


def test_the_rate_of_adapters_is_chosen_on_split_train_and_shown_on_test(benchmarks, measurements, monkeypatch):
    import adapters

    monkeypatch.setattr(adapters, "steps_of", lambda run, seen: 7)
    monkeypatch.setattr(adapters, "adapt", lambda run, factor, steps, out: None)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(adapters, "FACTORS", (3.0, 1.0))
    for run in RUNS:
        monkeypatch.setattr(run, "variant", "filtered")
    with pytest.raises(StopIteration):
        measurements(adapters)  # no run of the variant that saw the domain
    monkeypatch.setattr(RUNS[1], "variant", "unmasked")
    measured, rows = measurements(adapters)
    assert measured == [
        ("unmasked-s0-adapters-3.0", "train", 5),
        ("unmasked-s0-adapters-1.0", "train", 5),
        ("unmasked-s0-adapters", "test", 9),
    ]
    assert [row["chosen"] for row in rows if "chosen" in row] == [False, True]


def made_from(folder: Path, unlearning, monkeypatch) -> dict:
    """The source that a record has of a checkpoint in a folder, which is made the newest of any run."""
    (folder / MANIFEST).write_text("{}")
    monkeypatch.setattr(unlearning, "open_run", lambda run: (None, folder))
    return {"run": "unmasked-s0", "step": 9, "manifest_sha256": sha256_of(folder / MANIFEST)}


def test_a_run_of_another_setting_is_not_taken_for_the_chosen_one(unlearning, tmp_path, monkeypatch):
    monkeypatch.setattr(unlearning, "load_run_config", lambda run: RUNS[0].config)
    monkeypatch.setattr(unlearning, "unlearn_run", lambda *args, **options: pytest.fail("it is there"))
    record = {"domain": "es", "method": "npo", "steps": 1, "seed": 0, "options": {"beta": 0.1, "retain_weight": 1.0}}
    source = made_from(tmp_path, unlearning, monkeypatch)
    write_unlearned(tmp_path, record | {"lr": 0.2, "source": source})
    assert unlearning.apply(RUNS[0], "npo", {"beta": 0.1}, 3.0, tmp_path) == 0.2
    for options, factor in (({"beta": 1.0}, 3.0), ({"beta": 0.1}, 1.0)):
        with pytest.raises(ValueError, match=r"was not unlearned by npo with \{'beta': .*; remove it"):
            unlearning.apply(RUNS[0], "npo", options, factor, tmp_path)
    (tmp_path / MANIFEST).write_text("trained again")
    with pytest.raises(ValueError, match=r"was made from another checkpoint than .*; remove it"):
        unlearning.apply(RUNS[0], "npo", {"beta": 0.1}, 3.0, tmp_path)


def test_adapters_of_another_setting_or_source_are_not_taken_for_the_chosen_ones(unlearning, tmp_path, monkeypatch):
    import adapters

    monkeypatch.setattr(adapters, "adapt_run", lambda *args, **options: pytest.fail("they are there"))
    run = SimpleNamespace(directory=tmp_path, config=SimpleNamespace(optimizer=SimpleNamespace(lr=0.5)))
    record = {"domain": "es", "steps": 7, "lr": 1.5, "seed": 0, "seen": False, "options": {"rank": 16, "alpha": 32.0}}
    write_adapted(tmp_path, record | {"source": made_from(tmp_path, unlearning, monkeypatch)})
    adapters.adapt(run, 3.0, 7, tmp_path)
    for factor, steps, rank in ((1.0, 7, 16), (3.0, 8, 16), (3.0, 7, 8)):
        monkeypatch.setattr(adapters, "RANK", rank)
        with pytest.raises(ValueError, match=r"was not adapted with \{'rank': .*; remove it"):
            adapters.adapt(run, factor, steps, tmp_path)
    monkeypatch.setattr(adapters, "RANK", 16)
    (tmp_path / MANIFEST).write_text("trained again")
    with pytest.raises(ValueError, match="was made from another checkpoint than"):
        adapters.adapt(run, 3.0, 7, tmp_path)
