"""Links in README and docs lead to files and headings that exist; the picture of the method is what explain prints."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from sgtm.config import load_config
from sgtm.estimate.explain import print_explanation

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "launch" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_files_that_pages_name_exist():
    for page in PAGES:
        for name in re.findall(r"`((?:sgtm|kernels|tests|benchmarks|launch|docs)/[\w/.-]+)`", page.read_text("utf-8")):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 130


LABELS = ("unlabeled", "retain", "forget:es")


def updates(*overrides: str) -> tuple[str, dict[str, list[str]]]:
    """Title, and cells of LABELS by row, of the table of updates that `sgtm explain debug` prints."""
    console = Console(width=160, record=True, file=io.StringIO())
    print_explanation(load_config("debug", list(overrides)), console)
    title, *lines = console.export_text().partition("\nupdates: ")[2].partition("└")[0].splitlines()
    table = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines if line[:1] in "│┃"]
    columns = [table[0].index(label) for label in LABELS]
    rows = {row[0]: [row[column] for column in columns] for row in table[1:]}
    del rows["may update"], rows["share of the model"]
    return f"updates: {title.strip()}", rows


def summed_up(rows: dict[str, list[str]], pattern: str) -> list[str]:
    """Cells of the rows whose names match, which are all the same."""
    cells = {tuple(rows[name]) for name in rows if re.fullmatch(pattern, name)}
    assert len(cells) == 1, pattern
    return list(*cells)


@pytest.mark.parametrize("page", ["README.md", "docs/method.md"])
def test_the_picture_is_what_explain_prints(page):
    title, rows = updates("--masking.strategy=sgtm", "--masking.joint=free")
    _, strict = updates("--masking.strategy=sgtm", "--masking.joint=strict")
    patterns = {
        "retain attn, mlp": "retain (attn|mlp)_(in|out)",
        "es attn, mlp": "es (attn|mlp)_(in|out)",
        "output biases": "joint (attn|mlp)_out_bias",
        "other joint": "joint (?!(attn|mlp)_out_bias).*",
    }
    expected = [f"{name} {' '.join(summed_up(rows, pattern))}" for name, pattern in patterns.items()]
    assert sum(bool(re.fullmatch("|".join(patterns.values()), name)) for name in rows) == len(rows)
    changed = [name for name, pattern in patterns.items() if summed_up(rows, pattern) != summed_up(strict, pattern)]
    assert changed == ["other joint"] and summed_up(strict, patterns["other joint"])[-1] == "-"
    expected[-1] += " (- with masking.joint strict)"
    (picture,) = re.findall(r"^```\n(updates: .*?)^```", (ROOT / page).read_text("utf-8"), re.M | re.S)
    assert [" ".join(line.split()) for line in picture.splitlines()] == [title, " ".join(LABELS), *expected]
