"""`sgtm explain` of many domains (sgtm/estimate/roles.py): tables whose size does not grow with them."""

from __future__ import annotations

import io

import pytest
from many_domains import names
from rich.console import Console

from sgtm.config import load_config
from sgtm.estimate.explain import print_explanation


def explained(count: int, *options: str, width: int = 80) -> str:
    domains = ", ".join(names(count))
    sizes = [f"--masking.domains=[{domains}]", "--masking.forget_heads=0", "--masking.partition=add"]
    sizes += [] if "--recipe=certified" in options else ["--data.channel={}"]
    console = Console(width=width, record=True, file=io.StringIO())
    print_explanation(load_config("debug", [*sizes, *options]), console)
    return console.export_text()


def rows(text: str, first: str) -> list[list[str]]:
    """Cells of the rows whose first cell begins so."""
    lines = [line.strip("│┃ ").replace("┃", "│") for line in text.splitlines()]
    return [[cell.strip() for cell in line.split("│")] for line in lines if line.startswith(first)]


@pytest.mark.parametrize("count", [5, 50])
def test_domains_that_are_alike_have_one_row_in_eighty_columns(count):
    text = explained(count, "--recipe=certified")
    assert "…" not in text
    assert rows(text, f"forget: {count} domains")[0] == [f"forget: {count} domains", "runs", "runs", "off"]
    assert [row[-4:] for row in rows(text, "domain mlp_in")] == [["yes", "-", "yes", "-"]]
    assert rows(text, "domain mlp_in")[0][1] == f"{count} x 528"  # 2 layers of 8 neurons, 32 columns and a bias
    assert [row[-4:] for row in rows(text, "retain mlp_in")] == [["yes", "yes", "-", "-"]]
    assert rows(text, f"forget: {count} domains")[1][1:] == ["-", "-", "100%", "-"]
    assert text.count("only the domain's group learns it") == 1 and f"({count} domains)" in text
    assert f"for each of {count} domains: the domain's group learns to live with retained data" in text


def test_few_domains_have_a_column_each_where_there_is_room():
    text = explained(4, width=120)
    assert "forget:d4" in text and "own group" not in text
    assert rows(explained(4), "forget: 4 domains")


def test_what_differs_between_domains_is_shown():
    """One domain's label lets retain weights learn, another domain's group runs at half strength."""
    overrides = "{update.forget:d2.retain.mlp_out: 0.5, active.forget:d3.d3: 0.5}"
    text = explained(5, f"--masking.overrides={overrides}")
    assert rows(text, "forget: 5 domains")[0] == ["forget: 5 domains", "runs", "runs / runs x 0.5", "off"]
    assert rows(text, "retain mlp_out")[0][-2:] == ["- / x 0.5", "- / x 0.5"]
    assert rows(text, "retain mlp_in")[0][-2:] == ["-", "-"]


def test_open_labels_have_columns_of_their_own():
    channel = "{retain: {retain: 0.5, 'open:d1': 0.25, 'open:d2': 0.25}}"
    text = explained(5, f"--data.channel={channel}")
    assert rows(text, "open: 2 domains")[0] == ["open: 2 domains", "runs", "runs", "off"]
    assert [row for row in rows(text, "retain ") if len(row) > 1][-1][-2:] == ["-", "50%"]
