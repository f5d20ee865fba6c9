"""examples/classifier/flag.py: categories after a classifier whose mistakes are known."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "classifier" / "flag.py"
WORDS = {"biology": ("cell", "gene", "virus"), "web": ("house", "street", "train"), "mixed": ("cell", "house")}


def documents(disguised: int = 0) -> list[dict]:
    """200 of web and 100 of biology, of words of their own, so many of the latter in the words of web; 20 mixed."""
    draw = random.Random(0)
    lines = []
    for category, count in (("web", 200), ("biology", 100), ("mixed", 20)):
        for number in range(count):
            words = WORDS["web" if category == "biology" and number < disguised else category]
            lines.append({"text": " ".join(draw.choices(words, k=12)), "category": category, "id": len(lines)})
    return lines


def flag(folder: Path, lines: list[dict], *options: str) -> subprocess.CompletedProcess:
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, str(SCRIPT), str(folder / "in.jsonl"), str(folder / "out" / "out.jsonl.gz")]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = ["--category", "biology", "--leave", "mixed", "--documents", "150", *options]
    return subprocess.run([*command, *arguments], env=environ, capture_output=True, text=True)


def written(folder: Path) -> list[dict]:
    import gzip

    with gzip.open(folder / "out" / "out.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("options", [("--recall", "0.9"), ("--precision", "0.9")])
def test_where_words_tell_categories_apart_nothing_is_missed(tmp_path, options):
    done = flag(tmp_path, documents(), *options)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["documents"] == 150 and printed["recall"] >= 0.9 and printed["precision"] >= 0.9
    lines = written(tmp_path)
    assert [(line["text"], line["id"]) for line in lines] == [(line["text"], line["id"]) for line in documents()]
    categories = [line["category"] for line in lines]
    assert categories.count("biology-missed") <= 10 and categories.count("web-flagged") <= 10
    assert categories.count("mixed") == 20


def test_documents_in_disguise_are_missed_at_a_precision_and_cost_others_at_a_recall(tmp_path):
    done = flag(tmp_path, documents(disguised=40), "--precision", "0.95")
    assert done.returncode == 0, done.stderr
    lines = written(tmp_path)
    assert [line["category"] for line in lines[200:240]] == ["biology-missed"] * 40
    assert {line["category"] for line in lines[240:300]} == {"biology"}
    assert {line["category"] for line in lines[300:]} == {"mixed"}
    counts = json.loads(done.stdout)
    assert counts["precision"] == 1.0 and 0.4 < counts["recall"] < 0.8
    flag(tmp_path, documents(disguised=40), "--recall", "0.95")
    categories = [line["category"] for line in written(tmp_path)]
    assert categories.count("web-flagged") > 100 and categories.count("biology-missed") < 10


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (documents()[:204], ("--recall", "0.9"), "fewer than 5 of 150 documents are biology"),
        (documents(disguised=100), ("--precision", "0.99"), "no threshold has a precision of 0.99"),
        (documents(), ("--recall", "0.9", "--precision", "0.9"), "not allowed with argument"),
        (documents(), ("--recall", "1.5"), "take a share above 0 and at most 1, got 1.5"),
    ],
)
def test_what_cannot_be_learned_ends_in_one_line(tmp_path, lines, options, message):
    done = flag(tmp_path, lines, *options)
    assert done.returncode and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
