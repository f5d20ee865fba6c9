"""The page of a study: the means of its rows, its figures, and no network."""

from __future__ import annotations

import re

import pytest
from pages import Page
from studies import row, rows, standard, write_rows

from sgtm.sweep.page import write_study
from sgtm.sweep.study import read_study

FIGURES = ("ablated", "full", "front", "absorbed", "undiscovered", "leaked", "residual", "tampering")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return write_study(read_study(write_rows(folder / "mine.jsonl", rows())), folder / "page")


def test_page_is_whole_and_needs_no_network(written):
    page = Page(written)
    assert page.open == [] and set(FIGURES) <= set(page.ids) and page.source.count("<svg") == len(FIGURES)
    assert all(source.startswith("#") and source[1:] in page.ids for source in page.sources)
    assert "//" not in re.sub(r"<!--.*?-->", "", page.source, flags=re.S)
    assert all((written.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in FIGURES)


def test_table_has_the_means_of_the_rows(written):
    page, variants = Page(written), read_study(written.parents[1] / "mine.jsonl").variants
    means = [
        variant.loss(f"{model}_{data}").mean
        for variant in variants
        for model in ("full", "ablated")
        for data in ("retain", "forget")
        if variant.masks or model == "full"
    ]
    assert page.values == means
    by_name = {cells[0]: cells for cells in page.rows}
    assert by_name["standard-0"][5:] == ["–", "–", "–", "–"]
    assert by_name["ignored"][1:4] == ["3", "1,000", "3.100 ± 0.025"]
    assert by_name["safe"][-2:] == ["0", "0.000 ± 0.000"] and by_name["complete"][-1] == "–"
    assert "a device" in page.text and "c0ffee" in page.text and "train.steps: 10" in page.text


def test_machines_and_commits_stand_there_once(tmp_path):
    one, other = (row(name, (1.0, 1.0, 1.0, 1.0)) for name in ("one", "other"))
    other |= {"device": "another, a device", "commit": "c0ffee, decaf"}
    page = Page(write_study(read_study(write_rows(tmp_path / "a.jsonl", [one, other])), tmp_path / "new" / "page"))
    assert "a device, another" in page.text and "c0ffee, decaf" in page.text
    assert page.text.count("a device") == page.text.count("c0ffee") == 1


def test_a_figure_without_data_is_missing_with_its_reason(tmp_path):
    bare = row("mine", (1.0, 1.0, 1.0, 1.0)) | {"trained": {}}
    for seed in bare["seeds"]:
        del seed["residual"], seed["evaluations"]
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "leaked.png").write_bytes(b"of an earlier page")
    page = Page(write_study(read_study(write_rows(tmp_path / "mine.jsonl", [bare])), tmp_path / "page"))
    assert page.source.count("<svg") == 3 and not (tmp_path / "page" / "leaked.png").exists()
    for reason in ("No norms of the residual stream.", "No tamper curves: sgtm tamper writes them", "No leakage: "):
        assert reason in page.text


def test_examinations_have_a_table(tmp_path):
    examined = {"examined": "paper", "seed": 0, "domain": "es", "values": {"gain by context, es": {"control": 0.125}}}
    study = read_study(write_rows(tmp_path / "mine.jsonl", [row("paper", (1.0, 1.0, 1.0, 1.0)), examined]))
    page = Page(write_study(study, tmp_path / "page"))
    assert page.rows[-1] == ["paper", "gain by context, es", "control", "0.125"]


def test_names_from_outside_are_escaped(tmp_path):
    line = standard(0.0) | {"variant": "<script>alert(1)</script>"}
    assert "<script" not in write_study(read_study(write_rows(tmp_path / "a.jsonl", [line])), tmp_path).read_text()
