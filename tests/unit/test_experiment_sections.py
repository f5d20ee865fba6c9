"""Sections and figures of the experiments in the documents: what they hold, and when they are out of date."""

from __future__ import annotations

import re

import pytest
from studies import row, rows, write_rows


@pytest.fixture
def sections(benchmarks):
    import experiment_sections

    return experiment_sections


def with_spread(line: dict) -> dict:
    """A row as benchmarks/recipes.py writes it."""
    losses = {name: line["seeds"][1][name] for name in line["seeds"][1] if name.startswith(("full", "ablated"))}
    return {**line, **losses, **{f"{name}_sd": 0.01 for name in losses}, "ratios": {}}


def test_a_table_has_adjacent_columns_where_the_rows_have_them(sections):
    line = with_spread(row("paper", (3.0, 4.0, 3.5, 8.0)))
    plain = sections.tables([line])
    assert "| paper | 3 | 1,000 | 2,000,000 | 3.000 ± 0.010 | 4.000 ± 0.010 | 3.500 ± 0.010 | 8.000 ± 0.010 |" in plain
    six = {"full_adjacent": 3.2, "full_adjacent_sd": 0.1, "ablated_adjacent": 3.9, "ablated_adjacent_sd": None}
    text = sections.tables([{**line, **six}])
    assert "| full, retain | full, adjacent | full, forget | ablated, retain | ablated, adjacent |" in text
    assert "| 3.000 ± 0.010 | 3.200 ± 0.100 | 4.000 ± 0.010 | 3.500 ± 0.010 | 3.900 | 8.000 ± 0.010 |" in text
    unmasked = with_spread(row("unmasked", (3.0, 4.0, 3.0, 4.0), masks=False))
    assert sections.tables([unmasked]).endswith("4.000 ± 0.010 |  |  |")
    assert "Nothing is ablated" in sections.tables([line, unmasked]) and "Nothing is ablated" not in plain
    assert "retained" not in sections.tables([{**line, "trained": {}}]).splitlines()[2]


def test_every_set_of_several_domains_has_a_row(sections):
    line, one = row("dual", (3.0, 4.0, 3.5, 8.0), seeds=2), row("other", (3.0, 4.0, 3.5, 8.0))
    for number, seed in enumerate(line["seeds"]):
        names = ("full", "without es", "without bio", "without es, bio")
        losses = {name: {"en": 3.0 + number, "es": 4.0 + i + number * (i > 0)} for i, name in enumerate(names)}
        seed["losses"] = losses
    for seed in one["seeds"]:
        seed["losses"] = {"full": {"en": 3.0}, "without es": {"en": 3.0}}
    title, _, *other = sections.sets([one, line]).splitlines()
    assert title.startswith("Loss of the full model by category") and len(other) == 11
    assert other[:4] == ["| other | en |", "|---|---|", "| full | 3.000 ± 0.000 |", "| without es | +0.000 ± 0.000 |"]
    table = other[5:]
    assert table[0] == "| dual | en | es |" and len(table) == 6
    assert table[2] == "| full | 3.500 ± 0.707 | 4.000 ± 0.000 |"
    assert table[3] == "| without es | +0.000 ± 0.000 | +1.500 ± 0.707 |"
    assert sections.sets([one]) == ""


def test_a_section_has_question_commands_figures_and_meaning(sections, monkeypatch):
    import experiments

    mine = experiments.Experiment("Mine", "Does it?", "sgtm sweep mine.yaml", ("ablated", "full"), "It does.")
    monkeypatch.setitem(experiments.EXPERIMENTS, "mine", mine)
    text = sections.described("mine", [with_spread(row("paper", (3.0, 4.0, 3.5, 8.0)))], "results/mine.jsonl", "figs")
    assert text.startswith("**Question.** Does it?") and text.endswith("**Result.** It does.")
    assert "```sh\nsgtm sweep mine.yaml\n```" in text and "`sgtm report results/mine.jsonl` draws" in text
    images = re.findall(r"!\[.*\]\((.*)\)\n\n(\w+)", text)
    assert images == [("figs/mine-ablated.png", "Ablated"), ("figs/mine-full.png", "Full")]


def test_a_figure_is_out_of_date_when_its_rows_or_its_code_change(sections, monkeypatch, tmp_path):
    results, image = write_rows(tmp_path / "claims.jsonl", rows()), tmp_path / "figures" / "claims-ablated.png"
    monkeypatch.setattr(sections, "FIGURES", tmp_path / "figures")
    assert sections.figure_files([results])[image] == (results, "ablated")
    assert not sections.is_current(image, results)
    sections.draw(image, results, "ablated")
    assert sections.is_current(image, results)
    (tmp_path / "other.py").write_text("# other code")
    for code in (sections.study_figures, sections.palette, sections.leakage):
        with monkeypatch.context() as patch:
            patch.setattr(code, "__file__", str(tmp_path / "other.py"))
            assert not sections.is_current(image, results), code.__name__
    write_rows(results, rows()[:-1])
    assert not sections.is_current(image, results)
    write_rows(results, rows()[:3])
    with pytest.raises(LookupError, match="no figure tampering"):
        sections.draw(image, results, "tampering")
