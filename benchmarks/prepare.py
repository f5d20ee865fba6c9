"""CPU time and memory of `sgtm prepare` by size of the input: both must grow with it and no faster.

    python benchmarks/prepare.py [--case lines,runs] [--largest 256] [--json FILE]

Every case and size is a process of its own, which prepares with one worker in itself: CPU time is that of the process
and its threads, so that other processes on the machine matter little; memory is its largest resident size. Sizes are
MiB of text, or thousands of documents in `short`. `growth` is the exponent between a size and the one before: 1 is
linear, 2 quadratic. The exit status is 1 where one is above LIMIT from a second of CPU time on.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from arguments import one_of, positive
from environment import write_rows

from sgtm.data.discover import open_sources
from sgtm.data.prepare import prepare
from sgtm.data.rules import Rules

LIMIT = 1.25
FIXED_SECONDS = 1.0  # below, the fixed part of a process counts for too much
SHARD_TOKENS = 2**29
VOCABULARY = 270
RULES = Rules.model_validate({"split": {"constant": "train"}, "labels": {"a": "retain"}})
WORDS = [f"{word}{ending}" for word in ("the", "old", "mill", "ran", "dry", "again") for ending in ("", "s", "ing")]


def words(size: int) -> str:
    """Text of so many bytes, the same every time."""
    chance = random.Random(0)
    line = " ".join(chance.choices(WORDS, k=2**12)) + ". "
    return (line * (size // len(line) + 1))[:size]


def line(text: str) -> str:
    return json.dumps({"text": text, "category": "a"})


def write_document(folder: Path, size: int) -> Path:
    """One line of JSON."""
    (file := folder / "a.jsonl").write_text(line(words(size << 20)) + "\n")
    return file


def write_array(folder: Path, size: int) -> Path:
    """An array whose second member is long."""
    (file := folder / "a.json").write_text(f"[{line('short')},\n{line(words(size << 20))}]")
    return file


def write_csv(folder: Path, size: int) -> Path:
    """One field of many lines."""
    text = words(size << 20).replace(".", ".\n")
    (file := folder / "a.csv").write_text(f'text,category\n"{text}",a\n')
    return file


def write_run(folder: Path, size: int) -> Path:
    """A run of one character between words."""
    (file := folder / "a.jsonl").write_text("\n".join([line(words(2**16)), line("a" + " " * (size << 20) + "b")]))
    return file


def write_word(folder: Path, size: int) -> Path:
    """A word without an end, of random letters."""
    word = "".join(random.Random(0).choices("acgt", k=size << 20))
    (file := folder / "a.jsonl").write_text("\n".join([line(words(2**16)), line(word)]))
    return file


def write_many(folder: Path, size: int) -> Path:
    """Documents of 16 KiB: memory does not grow with these."""
    text = words(2**16)
    with (file := folder / "a.jsonl").open("w") as handle:
        handle.writelines(line(f"{number} {text[number % 2**15 :][: 2**14]}") + "\n" for number in range(size * 64))
    return file


def write_short(folder: Path, size: int) -> Path:
    """Thousands of documents of some words."""
    with (file := folder / "a.jsonl").open("w") as handle:
        handle.writelines(line(f"document {number} of many") + "\n" for number in range(size * 1000))
    return file


def write_files(folder: Path, size: int) -> Path:
    """Thousands of text files in folders of a hundred."""
    for number in range(size * 1000):
        subfolder = folder / f"{number // 100}" / "a"
        subfolder.mkdir(parents=True, exist_ok=True)
        (subfolder / f"{number}.txt").write_text(f"document {number} of many")
    return folder


CASES = {
    "document": (write_document, (1, 4, 16, 64, 256)),
    "array": (write_array, (1, 4, 16, 64, 256)),
    "csv": (write_csv, (1, 4, 16, 64, 256)),
    "run": (write_run, (1, 4, 16)),
    "word": (write_word, (1, 4, 16)),
    "many": (write_many, (1, 64, 256)),
    "short": (write_short, (10, 100, 1000)),
    "files": (write_files, (1, 10, 100)),
}


def measure(case: str, size: int) -> dict:
    """CPU seconds and MiB of one preparation in this process; the input is written before."""
    write, _ = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        (data := Path(folder) / "data").mkdir()
        source = write(data, size)
        start = time.process_time()
        options = {"vocab_size": VOCABULARY, "workers": 1, "shard_tokens": SHARD_TOKENS}
        corpus = prepare(open_sources([source]), RULES, "train", Path(folder) / "out", **options)
        seconds = time.process_time() - start
        tokens = sum(count.tokens for count in corpus.manifest.counts["train"].values())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"case": case, "size": size, "cpu_s": seconds, "memory_mib": memory, "tokens": tokens}


def measured(case: str, size: int) -> dict:
    """As `measure`, in a process of its own."""
    command = [sys.executable, __file__, "--measure", case, str(size)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def rows(cases: list[str], largest: int | None) -> Iterator[dict]:
    for case in cases:
        before = None
        for size in CASES[case][1]:
            if largest is None or size <= largest:
                row = measured(case, size)
                row["growth"] = None
                if before is not None and row["cpu_s"] >= FIXED_SECONDS:
                    row["growth"] = math.log(row["cpu_s"] / before["cpu_s"]) / math.log(size / before["size"])
                yield row
                before = row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--case", type=one_of(CASES), default=list(CASES), help=f"{','.join(CASES)} (default: all)")
    parser.add_argument("--largest", type=positive, help="leave out sizes above this")
    parser.add_argument("--json", type=Path, help="write one JSON object per row")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]))))
        return 0
    print(f"{'case':10}{'size':>6}{'tokens':>14}{'CPU s':>9}{'MiB':>8}{'growth':>8}")
    measurements = []
    for row in rows(options.case, options.largest):
        growth = "" if row["growth"] is None else f"{row['growth']:.2f}"
        print(
            f"{row['case']:10}{row['size']:6}{row['tokens']:14,}{row['cpu_s']:9.2f}{row['memory_mib']:8.0f}{growth:>8}",
            flush=True,
        )
        measurements.append(row)
    if options.json:
        write_rows(options.json, measurements)
    return int(any(row["growth"] is not None and row["growth"] > LIMIT for row in measurements))


if __name__ == "__main__":
    raise SystemExit(main())
