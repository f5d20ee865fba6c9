"""The report: what the page shows is what the run wrote, at any age of the run, without the network."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import pytest
from pages import CONFIG, SUMMARY, Page, page_without_figures, step, write_run
from rich.console import Console

from sgtm.config.schema import Config
from sgtm.evaluation.compute_ratio import ComputeRatio
from sgtm.report import print_comparison, print_summary, write_report
from sgtm.report.beside import Comparison
from sgtm.report.page import strategy_grids
from sgtm.report.record import read_record

FIGURES = ("ablation", "loss_curves", "evaluations", "residual_norms", "gradient_norms", "partition", "speed")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The page of a run that has everything."""
    return write_report(write_run(tmp_path_factory.mktemp("run")))


def test_page_is_whole_and_needs_no_network(written):
    page = Page(written)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids)) and set(FIGURES) <= set(page.ids)
    assert page.source.count("<svg") == len(FIGURES)
    assert all(source.startswith("#") and source[1:] in page.ids for source in page.sources)
    assert set(re.findall(r"url\(#([^)]*)\)", page.source)) <= set(page.ids)
    assert "//" not in re.sub(r"<!--.*?-->", "", page.source, flags=re.S)
    assert "#1b1d21" not in page.source.replace("--ink: #1b1d21", "")  # figures follow light and dark


@pytest.mark.parametrize(("figure", "cells"), [("gradient_norms", "Values"), ("partition", "Colours")])
def test_a_caption_explains_rows_columns_and_cells(written, figure, cells):
    source = written.read_text()
    caption = source[source.index(f'<figcaption id="{figure}-caption">') :].split("</figcaption>")[0]
    assert [caption.count(f"{word}: ") for word in ("Rows", "Columns", cells)] == [1, 1, 1]


def test_pngs_lie_beside_the_page(written):
    for name in FIGURES:
        assert (written.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_table_is_the_summary_to_the_last_digit(written):
    page = Page(written)
    losses = SUMMARY["losses"]
    expected = [losses[key][category] for category in ("en", "es", "fr") for key in losses]
    expected.insert(3, 3.0125)
    assert page.values == expected
    assert page.rows[0] == ["category", "true label", "full", "without es", "Δ", "without es,fr", "Δ", "no filter"]
    assert page.rows[2] == ["es", "forget:es", "3.346", "6.555", "+3.209", "6.600", "+3.254", "–"]
    assert page.rows[3][3:5] == ["2.400", "−0.100"]
    assert "9.8.7+test" in page.text and "forget_heads" in page.text and "1.31 M" in page.text


def test_provenance_is_that_of_the_newest_start(run):
    starts = [
        {"device": "T0", "commit": commit, "driver": None, "versions": {"torch": "9.9"}} for commit in ("c0", "c1")
    ]
    (run / "environment.jsonl").write_text("".join(json.dumps(line) + "\n" for line in starts))
    text = Page(write_report(run)).text
    assert all(part in text for part in ("T0", "c1", "9.9")) and "c0" not in text and "9.8.7+test" not in text
    assert "driver" not in text


@pytest.mark.parametrize(
    ("missing", "headline", "said", "figures"),
    [
        (
            ["summary.json"],
            "Removing es leaves the loss unchanged on en and raises it on es by 1.90",
            "Gradient norms are not measured in tr",
            6,
        ),
        (["summary.json", "metrics.jsonl"], "Nothing trained yet.", "No training losses yet", 1),
        (["config.yaml"], "Removing es raises", "The partition is unknown", 6),
        (["summary.json", "metrics.jsonl", "config.yaml"], "Nothing trained yet.", "The strategy is unknown", 0),
    ],
    ids=["no summary", "no training", "no config", "nothing"],
)
def test_what_is_missing_is_said(run, missing, headline, said, figures):
    for name in missing:
        (run / name).unlink()
    (run / "report").mkdir()
    (run / "report" / "ablation.png").write_bytes(b"of an earlier report")
    page = Page(write_report(run))
    assert page.open == [] and headline in page.text and said in page.text
    assert page.source.count("<svg") == len(list((run / "report").glob("*.png"))) == figures


def test_an_evaluation_of_the_full_model_alone(run):
    (run / "summary.json").write_text(json.dumps({"losses": {"full": {"en": 3.0}}}))
    page = Page(write_report(run))
    assert "The full model's loss is 3.00 on en, in nats; nothing was removed." in page.text and page.values == [3.0]
    (run / "config.yaml").write_text(CONFIG.replace("masking: {", "masking: {strategy: none, "))
    assert (
        "nothing was removed, as no group of a model that was trained without masks" in page_without_figures(run).text
    )
    console = Console(width=80, record=True, file=io.StringIO())
    print_summary(read_record(run).summary, console)
    assert "nothing is removed from a model that was trained without masks" in console.export_text()


def test_residual_norms_are_drawn_by_label_and_layer(run):
    page = write_report(run).read_text()
    figure = page[page.index('<figure id="residual_norms">') :].split("</figure>")[0]
    for text in ("retain", "forget:fr", "after layer 1", "after layer 2", "after layer 3", ">100<"):
        assert text in figure
    old = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"step"' in line]
    (run / "metrics.jsonl").write_text("".join(json.dumps({**json.loads(line), "norms": {}}) + "\n" for line in old))
    assert "No norms of the residual stream" in Page(write_report(run)).text


def test_a_warning_of_the_run_is_on_the_page(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "warning", "step": 90, "text": "the residual stream <grows>"}) + "\n")
    assert "Warning: the residual stream <grows>." in Page(write_report(run)).text


def test_runs_beside_a_run_are_on_page_and_terminal(run):
    ratios = {
        "full": {"en": ComputeRatio(0.934, 0.91, 0.95, False), "es": ComputeRatio(1.2, math.nan, math.nan, True)},
        "without es": {"en": ComputeRatio(0.5, 0.4, 0.6, False), "es": ComputeRatio(0.01, 0.0, 0.02, True)},
    }
    losses = {"none": {"en": 3.0, "es": 3.1}, "strict": {"en": 2.9}}
    comparison = Comparison(
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


def test_half_a_last_line_is_forgiven_and_a_repeated_step_counts_once(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write(step(80, loss=1.5) + "\n" + '{"kind": "st')
    steps = read_record(run).steps
    assert [line["step"] for line in steps] == list(range(1, 91))
    assert steps[79]["loss"] == 1.5


def test_damage_is_named(run, tmp_path):
    (run / "metrics.jsonl").write_text(step(1) + "\n{oops}\n" + step(2) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a JSON object"):
        write_report(run)
    (run / "metrics.jsonl").unlink()
    (run / "summary.json").write_text('{"losses":')
    with pytest.raises(ValueError, match=r"summary\.json is not valid JSON"):
        write_report(run)
    with pytest.raises(ValueError, match="not a run directory"):
        write_report(tmp_path / "nowhere")


def test_names_from_outside_are_escaped(run):
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"name": "<script>alert(1)</script>"}))
    assert "<script" not in write_report(run).read_text()


def test_strategy_grids_hold_the_tables(run):
    config: Config = read_record(run).config
    grids = {grid.title: dict(grid.rows) for grid in strategy_grids(config)}
    assert grids["active"]["retain"] == (1.0, 0.0, 0.0)
    assert grids["update"]["forget:fr"] == (0.0, 1.0, 1.0)
    assert grids["update_joint"]["forget:es"][:3] == (0.0, 0.0, 1.0)
    (run / "config.yaml").write_text(CONFIG.replace("masking: {", "masking: {strategy: no_mlp_out, "))
    titles = [grid.title for grid in strategy_grids(read_record(run).config)]
    assert titles == ["active", "route", "update (attn_in, attn_out, mlp_in)", "update (mlp_out)", "update_joint"]


def test_terminal_table_has_the_tokens_and_names_what_has_no_loss():
    console = Console(width=80, record=True, file=io.StringIO())
    tokens = {"train": {"en": 1234567, "es": 40}, "test": {"en": 5}}
    counts = {split: {c: {"documents": 1, "tokens": n} for c, n in by.items()} for split, by in tokens.items()}
    losses = {"full": {"en": 3.0}, "without es": {"en": 3.0}}
    print_summary({**SUMMARY, "losses": losses, "split": "test", "counts": counts}, console)
    text = console.export_text()
    assert re.search(r"tokens of +train +test, measured *\n.*\n *en +1,234,567 +5 *\n *es +40 +0 *\n *fr +0 +0", text)
    assert "no loss of es, fr: no documents to measure in split test" in text


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
