"""Writes docs/results.md with its figures, and the results blocks of other documents, from the committed results files.

    python benchmarks/report.py [--check] [--add DIR]

Every number in them comes from benchmarks/results/<device>/*.jsonl. `--check` writes nothing and exits 1 where a
file does not match the results (tests/processes/test_results.py). `--add` takes the rows of a run of gpu.py from DIR
into benchmarks/results/<device>/<date>_<commit>.jsonl first. Measurements of an op whose checks failed in that run, or
were not run, are left out of the documents (verdicts.py), which name it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import claims
import experiment_sections
import experiments
import gpu_run
from environment import RESULTS, read_rows
from journal import ENVIRONMENT
from step_table import steps
from tables import markdown, spread

from sgtm.sweep.study import read_study

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BEGIN, END = "<!-- results: written by benchmarks/report.py -->", "<!-- end of results -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--add", type=Path, metavar="DIR", help="the --out of a run of gpu.py")
    args = parser.parse_args()
    check = args.check
    if args.add:
        print(f"wrote {add(args.add)}")
    stale = [path for path, text in documents().items() if not path.exists() or path.read_text() != text]
    figures = experiment_sections.figure_files(results_files())
    old = [image for image, (rows, _) in figures.items() if not experiment_sections.is_current(image, rows)]
    surplus = [image for image in experiment_sections.FIGURES.glob("*.png") if image not in figures]
    for path in [*stale, *old, *surplus] if check else ():
        print(f"{path} does not match the results files; run python benchmarks/report.py", file=sys.stderr)
    if not check:
        for path in stale:
            path.write_text(documents()[path])
        for image in old:
            experiment_sections.draw(image, *figures[image])
        for image in surplus:
            image.unlink()
    return int(check and bool(stale or old or surplus))


def add(folder: Path) -> Path:
    """The rows of a run of gpu.py as one committed results file. Raises ValueError for a run on a CPU."""
    from gpu_stages.summary import rows_of

    rows = rows_of(folder)
    if not rows or not (folder / ENVIRONMENT).exists():
        raise ValueError(f"{folder} holds no rows of a run of gpu.py")
    machine = json.loads((folder / ENVIRONMENT).read_text())
    if machine["cpu"]:
        raise ValueError(f"{folder} is a run with --cpu, whose times mean nothing")
    path = RESULTS / slug(machine["device"]) / f"{rows[0]['time'][:10]}_{slug(machine['commit'])}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row | {"commit": machine["commit"]}) + "\n" for row in rows))
    return path


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def results_files() -> list[Path]:
    """In the order of the documents: experiments, then costs."""
    order = {name: number for number, name in enumerate(experiments.EXPERIMENTS)}
    return sorted(RESULTS.glob("*/*.jsonl"), key=lambda path: (order.get(path.stem, len(order)), path))


def documents() -> dict[Path, str]:
    """Text of every document that holds results."""
    paths = results_files()
    results = (
        "# Results\n\nWritten by `benchmarks/report.py` from `benchmarks/results/`; do not edit by hand. "
        "An experiment has its command with it; other tables are repeated as the top of their script in `benchmarks/` "
        "shows.\n\n"
    )
    studies = {path.stem: read_study(path) for path in paths if path.stem in experiments.EXPERIMENTS}
    results += f"### The papers' claims\n\n{claims.section(studies)}\n\n"
    by_document: dict[Path, list[Path]] = {}
    for path in paths:
        if document := document_of(path.stem):
            by_document.setdefault(document, []).append(path)
    texts = {DOCS / "results.md": results + "\n\n".join(section(path, "../", True) for path in paths) + "\n"}
    for document, of in by_document.items():
        up = "../" if document.parent == DOCS else ""
        texts[document] = _filled(document, [section(path, up) for path in of])
    return texts


def _filled(document: Path, sections: list[str]) -> str:
    """The document with these sections between its two marks."""
    before, rest = document.read_text().split(BEGIN)
    return "\n\n".join([before + BEGIN, *sections, END + rest.split(END)[1]])


def document_of(stem: str) -> Path | None:
    """The document beside docs/results.md that has the tables of a results file."""
    if stem in experiments.EXPERIMENTS:
        return DOCUMENTS.get(stem)
    return DOCUMENTS.get(stem, DOCS / "performance.md")


def section(path: Path, up: str, described: bool = False) -> str:
    """Markdown of one results file; `up` leads from the document to the root of the repository.

    described  with question, figures and meaning, where it is an experiment's
    """
    rows, relative = read_rows(path), path.relative_to(ROOT).as_posix()
    if "stage" in rows[0]:
        text = gpu_run.section(rows)
    elif path.stem in OWN:
        text = OWN[path.stem](rows)
    else:
        text = f"### {experiments.EXPERIMENTS[path.stem].title}\n\n"
        if described:
            text += experiment_sections.described(path.stem, rows, relative, "figures")
        else:
            text += experiment_sections.tables([row for row in rows if "variant" in row])
    return f"{text}\n\n" + "; ".join(_sources(rows)) + f" ([{path.name}]({up}{relative}))"


def _sources(rows: list[dict]) -> list[str]:
    """Where the rows were measured: an entry for each machine and torch, with all commits and days."""
    devices: dict[str, list[dict]] = {}
    for row in rows:
        threads = f"{row['threads']} thread{'s' * (row['threads'] != 1)}"
        devices.setdefault(f"{row['device']}, {threads}, torch {row['versions']['torch']}", []).append(row)
    return [
        ", ".join([device, f"commit {_each(own, 'commit')}", _each([{"day": row["time"][:10]} for row in own], "day")])
        for device, own in devices.items()
    ]


def _each(rows: list[dict], key: str) -> str:
    return ", ".join(dict.fromkeys(part for row in rows for part in row[key].split(", ")))


def domain_embedding(rows: list[dict]) -> str:
    return steps(rows, "What a domain's own embedding costs, a quarter of the sequences forget")


DOCUMENTS = {
    "quickstart": ROOT / "README.md",
    "steps": ROOT / "README.md",
    "novels": DOCS / "recipes.md",
    "prepare": DOCS / "data.md",
    "checkpoints": DOCS / "checkpoints.md",
    "export": DOCS / "export.md",
}
"""Of a results file, beside docs/results.md; of other costs it is docs/performance.md, of other experiments none."""


def checkpoints(rows: list[dict]) -> str:
    """Training time that a checkpoint takes, and its share at each interval."""
    intervals = list(rows[0]["share"])
    table = [
        ["checkpoint", "s lost p20 / p50 / p80", "s paused", "s until in place", *(f"every {n}" for n in intervals)]
    ]
    for r in rows:
        shares = [f"{r['share'][n]:.2%}" for n in intervals]
        table.append(
            [r["checkpoint"], spread(r["lost"]), f"{r['paused']['p50']:.3f}", f"{r['written']['p50']:.2f}", *shares]
        )
    r = rows[0]
    about = (
        f"{r['setting']}, {r['mib']:,.0f} MiB, steps of {r['step']['p50']:.2f} s, {r['rounds']} interleaved rounds; "
        "lost: time compared with the same steps without a checkpoint; every N: share of training time at that "
        "interval. Target: at most 1 % for the asynchronous one."
    )
    return f"### What a checkpoint costs\n\n{about}\n\n{markdown(table)}"


def prepared(rows: list[dict]) -> str:
    """CPU time and memory of `sgtm prepare` by size, a row for each kind of input."""
    table = [["input", "sizes", "CPU s", "largest growth", "peak MiB", "MiB a MiB"]]
    for case, (what, unit) in INPUTS.items():
        of = [row for row in rows if row["case"] == case]
        if not of:
            continue
        sizes, seconds, memory = ([row[key] for row in of] for key in ("size", "cpu_s", "memory_mib"))
        growth = [row["growth"] for row in of if row["growth"] is not None]
        table.append(
            [
                what,
                f"{', '.join(f'{size:,}' for size in sizes)} {unit}",
                ", ".join(f"{value:.1f}" for value in seconds),
                f"{max(growth):.2f}" if growth else "",
                ", ".join(f"{value:,.0f}" for value in memory),
                f"{(memory[-1] - memory[-2]) / (sizes[-1] - sizes[-2]):.1f}" if unit == "MiB" else "",
            ]
        )
    about = (
        "CPU time and peak memory of `sgtm prepare` with one worker, each size in a process of its own. Growth: the "
        "exponent of the time between one size and the next: 1 is linear, 2 quadratic; the sample for the tokenizer "
        "ends at 32 MiB. MiB a MiB: how memory grows with the input between the two largest sizes. The input is one "
        "document but in the last three rows."
    )
    return f"### What `prepare` costs\n\n{about}\n\n{markdown(table)}"


def exported(rows: list[dict]) -> str:
    """Memory of `sgtm export` by size of the model."""
    table = [["model", "weights", "files", "largest MiB", "anonymous MiB", "resident MiB", "s"]]
    for r in rows:
        parameters = f"{r['shape']} ({r['parameters'] / 1e9:.2f} billion parameters)"
        memory = [f"{r[key]:,.0f}" for key in ("largest_file_mib", "anonymous_mib", "resident_mib", "seconds")]
        table.append([parameters, r["dtype"], str(r["files"]), *memory])
    imports = max(r["imports_mib"] for r in rows)
    about = (
        f"Largest memory of the process that exports a Llama without one domain, the checkpoint a file of zeros. "
        f"Anonymous: what the kernel cannot take back, {imports:,.0f} MiB of it from the imports; target: at most "
        f"4,096 MiB above the largest file of weights. Resident: with pages of files, which it can."
    )
    return f"### What an export takes\n\n{about}\n\n{markdown(table)}"


INPUTS = {
    "document": ("one line of JSON", "MiB"),
    "array": ("member of a JSON array", "MiB"),
    "csv": ("field of a CSV file", "MiB"),
    "run": ("run of one character", "MiB"),
    "word": ("one word of random letters", "MiB"),
    "many": ("documents of 16 KiB", "MiB"),
    "short": ("short documents in a file", "thousand"),
    "files": ("text files in folders", "thousand"),
}
OWN = {
    "steps": steps,
    "checkpoints": checkpoints,
    "domain_embedding": domain_embedding,
    "prepare": prepared,
    "export": exported,
}


if __name__ == "__main__":
    sys.exit(main())
