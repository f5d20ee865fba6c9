"""Page and terminal show the same of a run."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import pytest
from pages import SUMMARY, Page, many_categories, page_without_figures, write_run
from rich.console import Console

from sgtm.evaluation.compute_ratio import ComputeRatio
from sgtm.report import print_comparison, print_summary, write_report
from sgtm.report.beside import RunComparison


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def test_runs_beside_a_run_are_on_page_and_terminal(run):
    ratios = {
        "full": {"en": ComputeRatio(0.934, 0.91, 0.95, False), "es": ComputeRatio(1.2, math.nan, math.nan, True)},
        "without es": {"en": ComputeRatio(0.5, 0.4, 0.6, False), "es": ComputeRatio(0.01, 0.0, 0.02, True)},
    }
    losses = {"none": {"en": 3.0, "es": 3.1}, "strict": {"en": 2.9}}
    comparison = RunComparison(
        losses, {"none": {"en": 0.01}}, {"none": ratios}, ["none: as it is.", "No ratio to strict."]
    )
    page = page_without_figures(run, comparison)
    assert page.rows[0][-2:] == ["none", "strict"], "in place of what ships with a preset"
    assert page.rows[1][-2:] == ["3.000 ± 0.010", "2.900"] and page.rows[2][-2:] == ["3.100", "–"]
    first = page.rows.index(["category", "full", "without es"])
    assert page.rows[first + 1 : first + 3] == [
        ["en", "0.93 (0.91 to 0.95)", "0.50 (0.40 to 0.60)"],
        ["es", "1.20*", "0.01* (0.00 to 0.02)"],
    ]
    assert "Compute ratio to none" in page.text and "none: as it is." in page.text
    assert "Compute ratio" not in page_without_figures(run).text
    console = Console(width=80, record=True, file=io.StringIO())
    print_comparison(comparison, console)
    text = console.export_text()
    assert re.search(r"en +0.93 \(0.91 to 0.95\) +0.50 \(0.40 to 0.60\)", text) and "* extrapolated" in text
    assert text.startswith("none: as it is.\nNo ratio to strict.\n") and "compute ratio to none" in text


def test_a_small_test_set_is_grey_on_page_and_terminal(run):
    (run / "summary.json").write_text(json.dumps(many_categories()))
    page = page_without_figures(run)
    assert page.source.count('<tr class="small">') == 1
    assert [row[:3] for row in page.rows[1:4]] == [
        ["a", "retain", "1,000"], ["b", "retain", "9,000"], ["tiny", "retain", "740"],
    ]  # fmt: skip
    sentence = "In grey: tiny (740); fewer than 1,000 tokens were measured, so these losses are not reliable."
    assert sentence in page.text
    console = Console(width=200, record=True, file=io.StringIO(), force_terminal=True)
    print_summary(many_categories(), console)
    text = console.export_text(styles=True)
    assert sentence in text and re.search(r"\x1b\[2mtiny", text) and not re.search(r"\x1b\[2ma ", text)


def test_page_and_terminal_count_the_measured_tokens(run):
    """A token less than the split has, whose first one is not predicted; of the other splits those that are there."""
    measured = {"en": {"documents": 9, "tokens": 8487}}
    counts = {"train": {"en": {"tokens": 70001}}, "test": {"en": {"tokens": 8488}}}
    summary = {"losses": {"full": {"en": 3.0}}, "true_labels": {"en": "retain"}, "measured": measured}
    summary |= {"counts": counts, "split": "test", "sequences": None}
    (run / "summary.json").write_text(json.dumps(summary))
    page = page_without_figures(run)
    assert page.rows[0][2] == "tokens, measured" and page.rows[1][2] == "8,487"
    console = Console(width=80, record=True, file=io.StringIO())
    print_summary(summary, console)
    text = console.export_text()
    assert re.search(r"tokens of +train +test, measured *\n.*\n *en +70,001 +8,487", text) and "8,488" not in text


def test_losses_carry_their_standard_errors(run):
    errors = {"full": {"es": 0.0123}, "without es": {"es": 0.05, "en": 0.00002}}
    summary = {**SUMMARY, "errors": errors, "difference_errors": {"without es": {"es": 0.0449}}}
    (run / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(run))
    assert page.rows[1][2:5] == ["3.123", "3.141 ± 0.001", "+0.018"]
    assert page.rows[2][2:5] == ["3.346 ± 0.012", "6.555 ± 0.050", "+3.209 ± 0.045"]
    assert "+3.209 ± 0.045 without es" in page.source
    console = Console(width=80, record=True, file=io.StringIO())
    print_summary({**summary, "baselines": {"unmasked": {"es": 0.0}, "filtered": {"es": 0.0}}}, console)
    text = console.export_text()
    assert re.search(r"es +forget:es +3\.346±0\.012 +6\.555 +\+3\.209±0\.045 +0\.000 +0\.000", text)
    assert "standard error over documents" in text and "…" not in text
