"""Sections and figures of the experiments in the documents: what they hold, and when they are out of date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from studies import row, rows, write_rows

from sgtm.sweep import study_figures

ROOT = Path(__file__).parents[2]


@pytest.fixture
def experiments(benchmarks):
    import experiments

    return experiments


def with_spread(line: dict) -> dict:
    """A row as benchmarks/recipes.py writes it."""
    losses = {name: line["seeds"][1][name] for name in line["seeds"][1] if name.startswith(("full", "ablated"))}
    return {**line, **losses, **{f"{name}_sd": 0.01 for name in losses}, "ratios": {}}


def test_a_table_has_adjacent_columns_where_the_rows_have_them(experiments):
    line = with_spread(row("paper", (3.0, 4.0, 3.5, 8.0)))
    plain = experiments.tables([line])
    assert "| paper | 3 | 1,000 | 3.000 ± 0.010 | 4.000 ± 0.010 | 3.500 ± 0.010 | 8.000 ± 0.010 |" in plain
    six = {"full_adjacent": 3.2, "full_adjacent_sd": 0.1, "ablated_adjacent": 3.9, "ablated_adjacent_sd": None}
    text = experiments.tables([{**line, **six}])
    assert "| full, retain | full, adjacent | full, forget | ablated, retain | ablated, adjacent |" in text
    assert "| 3.000 ± 0.010 | 3.200 ± 0.100 | 4.000 ± 0.010 | 3.500 ± 0.010 | 3.900 | 8.000 ± 0.010 |" in text
    unmasked = with_spread(row("unmasked", (3.0, 4.0, 3.0, 4.0), masks=False))
    assert experiments.tables([unmasked]).endswith("4.000 ± 0.010 |  |  |")


def test_every_set_of_several_domains_has_a_row(experiments):
    line, one = row("dual", (3.0, 4.0, 3.5, 8.0), seeds=2), row("other", (3.0, 4.0, 3.5, 8.0))
    for number, seed in enumerate(line["seeds"]):
        names = ("full", "without es", "without bio", "without es, bio")
        seed["losses"] = {name: {"en": 3.0 + number, "es": 4.0 + i} for i, name in enumerate(names)}
    for seed in one["seeds"]:
        seed["losses"] = {"full": {"en": 3.0}, "without es": {"en": 3.0}}
    table = experiments.sets([one, line]).splitlines()[2:]
    assert table[0] == "| dual | en | es |" and table[3] == "| without es | 3.500 | 5.000 |" and len(table) == 6
    assert experiments.sets([one]) == ""


def test_a_section_has_question_commands_figures_and_meaning(experiments, monkeypatch):
    mine = experiments.Experiment("Mine", "Does it?", "sgtm sweep mine.yaml", ("ablated", "full"), "It does.")
    monkeypatch.setitem(experiments.EXPERIMENTS, "mine", mine)
    text = experiments.described(
        "mine", [with_spread(row("paper", (3.0, 4.0, 3.5, 8.0)))], "results/mine.jsonl", "figs"
    )
    assert text.startswith("**Question.** Does it?") and text.endswith("**Result.** It does.")
    assert "```sh\nsgtm sweep mine.yaml\n```" in text and "`sgtm report results/mine.jsonl` draws" in text
    images = re.findall(r"!\[.*\]\((.*)\)\n\n(\w+)", text)
    assert images == [("figs/mine-ablated.png", "Ablated"), ("figs/mine-full.png", "Full")]


def test_every_figure_is_one_of_a_study(experiments):
    for name, experiment in experiments.EXPERIMENTS.items():
        assert all(callable(getattr(study_figures, figure)) for figure in experiment.figures), name
        assert experiment.question.endswith("?") and experiment.commands, name
        assert not (run := [*ROOT.glob(f"benchmarks/results/*/{name}.jsonl")]) or experiment.meaning, run


def test_the_commands_name_files_and_rows_that_are_there(experiments):
    """Recipes, rules and scripts are in the tree, and what the last command writes is the experiment's file."""
    for name, experiment in experiments.EXPERIMENTS.items():
        paths = re.findall(r"\b(?:launch|benchmarks|examples)/[\w./-]+\.(?:yaml|py)\b", experiment.commands)
        assert paths and all((ROOT / path).is_file() for path in paths), name
        assert experiment.commands.endswith(f"--json benchmarks/results/DEVICE/{name}.jsonl"), name
        assert "{{" not in experiment.commands, name


def test_a_figure_is_out_of_date_when_its_rows_or_its_code_change(experiments, monkeypatch, tmp_path):
    results, image = write_rows(tmp_path / "claims.jsonl", rows()), tmp_path / "figures" / "claims-ablated.png"
    monkeypatch.setattr(experiments, "FIGURES", tmp_path / "figures")
    assert experiments.figure_files([results])[image] == (results, "ablated")
    assert not experiments.is_current(image, results)
    experiments.draw(image, results, "ablated")
    assert experiments.is_current(image, results)
    (tmp_path / "other.py").write_text("# other code")
    with monkeypatch.context() as patch:
        patch.setattr(experiments.study_figures, "__file__", str(tmp_path / "other.py"))
        assert not experiments.is_current(image, results)
    write_rows(results, rows()[:-1])
    assert not experiments.is_current(image, results)
    write_rows(results, rows()[:3])
    with pytest.raises(LookupError, match="no figure tampering"):
        experiments.draw(image, results, "tampering")
