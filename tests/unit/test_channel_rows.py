"""What a row of a label channel buys and costs, for each recipe and wherever a channel is shown."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from sgtm.config import load_config
from sgtm.config.schema import Config
from sgtm.estimate.explain import print_explanation
from sgtm.masking import channel as rows
from sgtm.masking.channel import most_with_group, row_lines
from sgtm.masking.recipes import NAMES
from sgtm.report.page import channel_grids

ROOT = Path(__file__).parents[2]


def lines_of(config: Config) -> dict[str, str]:
    return {line.partition(": ")[0]: line.partition(": ")[2] for line in rows_of(config)}


def rows_of(config: Config) -> list[str]:
    return row_lines(config.channels[0][1], config.tables, config.masking.strategy)


def largest_shares(config: Config) -> dict[str, float]:
    return most_with_group(config.channels, config.tables)


RETAIN = {
    "paper": f"75% as unlabeled: {rows.MIXED}; 25% as retain: {rows.ALONE}",
    "gram": f"80% as retain: {rows.ALONE}; 20% as open:es: {rows.MIXED}",
    "dual": f"60% as retain: {rows.ALONE}; 40% as open:es: {rows.MIXED}",
    "certified": f"80% as retain: {rows.ALONE}; 20% as forget:es: {rows.LIVED_WITH}",
}
FORGET = {
    "paper": f"100% as forget:es: {rows.DOMAIN_AND_MORE}",
    "gram": f"50% as forget:es: {rows.DOMAIN_ALONE}; 50% as open:es: {rows.ABSORBS}",
    "dual": f"80% as forget:es: {rows.DOMAIN_AND_MORE}; 20% as open:es: {rows.ABSORBS}",
    "certified": f"100% as forget:es: {rows.DOMAIN_ALONE}",
}


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_every_recipe(name):
    config = load_config("debug", ["--recipe", name])
    assert lines_of(config) == {
        "unlabeled": f"100% as unlabeled: {rows.UNKNOWN}", "retain": RETAIN[name], "forget:es": FORGET[name],
    }  # fmt: skip
    assert largest_shares(config) == {"es": pytest.approx({"paper": 0.75, "dual": 0.4}.get(name, 0.2))}


def test_what_no_recipe_has():
    two = ["--recipe=certified", "--masking.domains=[es, fr]", "--masking.certify=false"]
    channel = "{retain: {retain: 1, 'forget:fr': 0.5}, 'forget:es': {retain: 0.1}}"
    config = load_config("debug", [*two, "--data.both_ways=true", f"--data.channel={channel}"])
    lines = lines_of(config)
    apart = f"as no label with all groups: {rows.NEVER_TOGETHER}"
    assert lines["retain"].endswith(f"; never with es: {rows.NEVER_SEEN}; {apart}; {rows.TWICE}")
    assert lines["forget:es"] == f"10% as retain: {rows.STAYS}; 90% as forget:es: {rows.DOMAIN_ALONE}; {apart}"
    assert largest_shares(config) == {"es": 0.0, "fr": 0.5}
    later = load_config("debug", [*two, "--data.channel={}", "--data.schedule={0.5: {retain: {'open:es': 0.3}}}"])
    assert largest_shares(later) == {"es": pytest.approx(0.3), "fr": 0.0}
    unmasked = load_config("debug", ["--masking.strategy=none"])
    assert rows_of(unmasked) == [rows.UNMASKED]


@pytest.mark.parametrize("name", NAMES)
def test_data_that_never_train_all_groups_together(name):
    config = load_config("debug", ["--recipe", name, "--masking.domains=[es, fr]", "--masking.certify=false"])
    apart = {true for true, line in lines_of(config).items() if rows.NEVER_TOGETHER in line}
    everything = {"retain", "forget:es", "forget:fr"}
    assert apart == {"dual": set(), "paper": everything - {"retain"}}.get(name, everything)
    across = "--masking.cross_domain=active"  # tokens of a domain run with the others' groups
    if name != "gram":
        config = load_config(
            "debug", ["--recipe", name, "--masking.domains=[es, fr]", "--masking.certify=false", across]
        )
        assert not any(rows.NEVER_TOGETHER in line for line in lines_of(config).values())


def test_the_documentation_has_every_sentence():
    document = (ROOT / "docs/recipes.md").read_text("utf-8")
    sentences = [value for value in vars(rows).values() if isinstance(value, str) and " " in value]
    sentences.remove(rows.__doc__)
    assert len(sentences) == 12 and [sentence for sentence in sentences if sentence not in document] == []


@pytest.mark.parametrize("channel", ["{}", "{retain: {retain: 0.5, 'forget:es': 0.5}}"])
def test_explain_and_report_show_them(channel):
    """Explain also where no channel is set, as every document then keeps its label."""
    config = load_config("debug", [f"--data.channel={channel}"])
    console = Console(width=80, record=True, file=io.StringIO())
    print_explanation(config, console)
    printed = console.export_text().splitlines()
    ((grid, lines),) = channel_grids(config)
    assert lines == rows_of(config) and set(lines) <= set(printed)
    assert [label for label, _ in grid.rows] == ["unlabeled", "retain", "forget:es"]
    assert any(line.startswith("label channel") for line in printed) == (channel != "{}")
