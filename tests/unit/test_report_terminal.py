"""The losses of a run in the terminal, in eighty columns."""

from __future__ import annotations

import io
import re

import pytest
from many_domains import summary
from pages import SUMMARY
from rich.console import Console

from sgtm.report.terminal import print_summary


def test_terminal_table_has_the_tokens_and_names_what_has_no_loss():
    console = Console(width=80, record=True, file=io.StringIO())
    tokens = {"test": {"en": 5}, "train": {"en": 1234567, "es": 40}}
    counts = {split: {c: {"documents": 1, "tokens": n} for c, n in by.items()} for split, by in tokens.items()}
    losses = {"full": {"en": 3.0}, "without es": {"en": 3.0}}
    print_summary({**SUMMARY, "losses": losses, "split": "test", "counts": counts, "left_out": ["es"]}, console)
    text = console.export_text()
    assert re.search(
        r"tokens of +train +test, measured *\n.*\n *en +1,234,567 +5 *\n *es +40, left out +0 *\n *fr +0 +0", text
    )
    assert "no loss of es, fr: no documents to measure in split test" in text


def test_a_model_without_ablated_losses_is_one_that_was_trained_without_masks():
    console = Console(width=80, record=True, file=io.StringIO())
    print_summary({"losses": {"full": {"en": 3.0}}, "true_labels": {"en": "retain"}}, console)
    assert "nothing is removed from a model that was trained without masks" in console.export_text()


@pytest.mark.parametrize("of_steps", [90, 200])
def test_terminal_headline_says_that_a_run_is_not_finished(of_steps):
    console = Console(width=80, record=True, file=io.StringIO())
    print_summary({**SUMMARY, "of_steps": of_steps}, console)
    partly = "" if of_steps == 90 else " at step 90 of 200"
    assert console.export_text().startswith(f"trial: held-out loss{partly}, nats per token\n")


def test_terminal_table_has_the_figures_in_eighty_columns():
    console = Console(width=80, record=True, file=io.StringIO())
    print_summary(SUMMARY, console)
    text = console.export_text()
    assert re.search(r"category +true label +full +without es +difference +no filter", text)
    assert re.search(r"en +retain +3\.123 +3\.141 +.0\.018 +3\.013", text)
    assert "no filter: full models trained without masks" in text
    assert re.search(r"es +forget:es +3\.346 +6\.555 +\+3\.209", text)
    assert "residual stream" not in text
    norms = {"full": {"en": {"residual": [0.5, 12.34]}, "es": {"residual": [0.5, 9.0]}}}
    print_summary({**SUMMARY, "output_norms": norms}, console)
    assert "residual stream after the last layer, mean norm: full en 12.3, es 9" in console.export_text()
    assert re.search(r"fr +forget:fr +2\.500 +5\.250 +\+2\.750", text)
    assert "…" not in text


def lines_of(text: str, first: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(first)]


@pytest.mark.parametrize("count", [4, 20, 50])
def test_many_sets_are_one_table_in_eighty_columns(count):
    """A row for each set; of few domains a column for each, else means and the domain that changes most."""
    console = Console(width=80, record=True, file=io.StringIO())
    of = summary(count, ("d1", "d3"))
    of["losses"]["without d2"]["d4"] += 0.5
    print_summary(of, console)
    text = console.export_text()
    assert "…" not in text and len(lines_of(text, "without ")) == count + 2
    (pair,), (second,) = lines_of(text, "without d1,d3"), lines_of(text, "without d2 ")
    (every,) = lines_of(text, f"without {'all ' + str(count) + ' domains'}")
    if count == 4:
        assert lines_of(text, "set")[0].split() == ["set", "retain", "d1", "d2", "d3", "d4"]
        assert lines_of(text, "full")[0].split() == ["full", "2.02", "2.20", "2.30", "2.40", "2.50"]
        assert pair.split()[1:] == ["d1,d3", "+0.01", "+0.10", "+0.02", "+0.30", "+0.02"]
        assert second.split()[-4:] == ["+0.02", "+0.20", "+0.02", "+0.52"]
    else:
        assert lines_of(text, "set")[0].split() == ["set", "own", "other", "domains", "most", "of", "them", "retain"]
        others = (0.02 * (count - 1) + 0.5) / (count - 1)
        assert second.split()[2:] == ["+0.20", f"+{others:.2f}", "+0.52", "d4", "+0.01"]
        assert pair.split()[2:4] == ["+0.20", "+0.02"]
        assert every.split()[-2:] == [f"+{sum(range(1, count + 1)) / count / 10:.2f}", "+0.01"]


def test_a_domain_at_a_strength_has_a_table():
    console = Console(width=80, record=True, file=io.StringIO())
    losses = {"full": {"es": 2.0}, "without es": {"es": 6.0}, "with es at 0.5": {"es": 3.0}}
    print_summary({"losses": losses, "true_labels": {"es": "forget:es"}}, console)
    assert re.search(r"es +forget:es +2\.000 +3\.000 +\+1\.000", console.export_text())
