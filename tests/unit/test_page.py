"""The page: it shows what the run wrote, at any age of the run, without the network."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from many_domains import names, summary
from pages import CONFIG, SUMMARY, Page, page_without_figures, write_run

from sgtm.config.schema import Config
from sgtm.report import write_report
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
    ("missing", "headline", "sentence", "figures"),
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
def test_what_is_missing_is_said(run, missing, headline, sentence, figures):
    for name in missing:
        (run / name).unlink()
    (run / "report").mkdir()
    (run / "report" / "ablation.png").write_bytes(b"of an earlier report")
    page = Page(write_report(run))
    assert page.open == [] and headline in page.text and sentence in page.text
    assert page.source.count("<svg") == len(list((run / "report").glob("*.png"))) == figures


def test_an_evaluation_of_the_full_model_alone(run):
    (run / "summary.json").write_text(json.dumps({"losses": {"full": {"en": 3.0}}}))
    page = Page(write_report(run))
    assert "The full model's loss is 3.00 on en, in nats; nothing was removed." in page.text and page.values == [3.0]
    (run / "config.yaml").write_text(CONFIG.replace("masking: {", "masking: {strategy: none, "))
    assert (
        "nothing was removed, as no group of a model that was trained without masks" in page_without_figures(run).text
    )


def test_a_token_filter_is_on_the_page(run):
    unfiltered = CONFIG.replace("masking: {", "masking: {strategy: none, span_policy: position, ")
    for keys, shown in (("", False), (", token_filter: hide", True)):
        (run / "config.yaml").write_text(f"{unfiltered}data: {{mixing: token{keys}}}\n")
        assert ("token filter" in page_without_figures(run).text) == shown


def test_a_warning_of_the_run_is_on_the_page(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "warning", "step": 90, "text": "the residual stream <grows>"}) + "\n")
    assert "Warning: the residual stream <grows>." in Page(write_report(run)).text


def test_names_from_outside_are_escaped(run):
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"name": "<script>alert(1)</script>"}))
    assert "<script" not in write_report(run).read_text()


def test_strategy_grids_hold_the_tables(run):
    config: Config = read_record(run).config
    grids = {grid.title: dict(grid.rows) for grid in strategy_grids(config.tables)}
    assert grids["active"]["retain"] == (1.0, 0.0, 0.0)
    assert grids["update"]["forget:fr"] == (0.0, 1.0, 1.0)
    assert grids["update_joint"]["forget:es"][:3] == (0.0, 0.0, 1.0)
    (run / "config.yaml").write_text(CONFIG.replace("masking: {", "masking: {strategy: no_mlp_out, "))
    titles = [grid.title for grid in strategy_grids(read_record(run).config.tables)]
    assert titles == ["active", "route", "update (attn_in, attn_out, mlp_in)", "update (mlp_out)", "update_joint"]


def test_tokens_of_passages_are_coloured_and_escaped(run):
    losses = {"full": [None, 1.0], "without es": [None, 3.0]}
    passage = {"category": "es", "tokens": ["<b>", " sí"], "losses": losses}
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"passages": [passage]}))
    page = page_without_figures(run)
    assert "es, full against without es" in page.text and "<b> sí" in page.text and page.open == []
    assert '<span class="up" style="--shade: 50%" title="1.00 full, 3.00 without es"> sí</span>' in page.source


@pytest.mark.parametrize("count", [4, 20])
def test_many_sets_are_a_table_that_scrolls_in_its_box(tmp_path, count):
    """Sets by domains, to the last digit; the table by category has the full model alone."""
    of, domains = summary(count, ("d1", "d2")), names(count)
    run = write_run(tmp_path)
    masking = f"masking: {{domains: [{', '.join(domains)}], forget_heads: 0, forget_neurons: 1, partition: add}}\n"
    (run / "config.yaml").write_text(re.sub(r"masking: .*\n", masking, CONFIG))
    (run / "metrics.jsonl").unlink()
    (run / "summary.json").write_text(json.dumps(of))
    page = Page(write_report(run))
    assert page.open == [] and "Red: the loss rises" in page.source
    box, _, table = page.source.partition('<table id="sets">')
    assert box.rstrip().endswith('<div class="scroll">')
    rows = re.findall(r"<tr>(.*?)</tr>", table.partition("</table>")[0], flags=re.S)
    assert re.findall(r">([^<>]*)</th>", rows[0]) == ["set", "retain", *domains]
    assert len(rows) == 1 + 1 + count + 2
    for row, condition in zip(rows[1:], of["losses"], strict=True):
        values = [float(value) for value in re.findall(r'data value="([^"]*)"', row)]
        assert values[1:] == [of["losses"][condition][domain] for domain in domains]
        removed = condition.removeprefix("without ").split(",")
        meant = re.findall(r'<td( class="meant")?>', row)[1:]
        assert [domain for domain, bold in zip(domains, meant, strict=True) if bold] == [
            domain for domain in domains if domain in removed
        ]
    assert not any("without" in cell for cell in page.rows[0])
