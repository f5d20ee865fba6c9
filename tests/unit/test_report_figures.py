"""The figures of a report: what each draws, and that it is None where a run has nothing for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pages import Page, write_run

from sgtm.report import write_report


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def test_residual_norms_are_drawn_by_label_and_layer(run):
    page = write_report(run).read_text()
    figure = page[page.index('<figure id="residual_norms">') :].split("</figure>")[0]
    for text in ("retain", "forget:fr", "after layer 1", "after layer 2", "after layer 3", ">100<"):
        assert text in figure
    old = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"step"' in line]
    (run / "metrics.jsonl").write_text("".join(json.dumps({**json.loads(line), "norms": {}}) + "\n" for line in old))
    assert "No norms of the residual stream" in Page(write_report(run)).text
