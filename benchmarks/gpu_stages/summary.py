"""Summary of a run as text: the outcomes of its stages, and of the checks of each op."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from journal import ENVIRONMENT, Journal, last_by
from verdicts import OPS, VARIANTS, latest, verdicts

from gpu_stages.driver import STAGES
from gpu_stages.stages import NAMES


def rows_of(folder: Path) -> list[dict]:
    """All rows of a run, each with the stage that it is of, in the order of the stages."""
    rows = []
    for stage in NAMES:
        for path in sorted({*folder.glob(f"{stage}.jsonl"), *folder.glob(f"{stage}-*.jsonl")}):
            rows += [{"stage": stage} | row for row in Journal(path).rows()]
    return rows


def text(folder: Path) -> str:
    machine = json.loads((folder / ENVIRONMENT).read_text())
    rows, stages = rows_of(folder), last_by(Journal(folder / STAGES).rows(), "stage", "unit")
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "triton"))
    software = f"{versions}, driver {machine['driver']}, commit {machine['commit']}"
    parts = [f"\n{machine['device']}, {software}; rows in {folder}"]
    table = [["stage", "unit", "outcome", "s", "of", "rows", "failed"]]
    for row in stages:
        own = [r for r in rows if r["stage"] == row["stage"] and _of_unit(r, row["unit"])]
        failed = sum("error" in r for r in (*latest(own), *(r for r in own if "item" not in r)))
        table.append([row["stage"], row["unit"], row["outcome"], f"{row['seconds']:.1f}", f"{row['limit']:.0f}",
                      str(len(own)), str(failed or "")])  # fmt: skip
    parts.append(aligned(table))
    backends = sorted({row["backend"] for row in rows if row["stage"] == "smoke" and "backend" in row}, reverse=True)
    if backends:
        by_backend = {backend: verdicts(rows, backend) for backend in backends}
        table = [["op", *(f"smoke, {backend}" for backend in backends), "tests"]]
        for op in OPS:
            row = [by_backend[backend][op] for backend in backends]
            table.append([op, *(verdict.smoke for verdict in row), row[0].tests])
        parts.append(aligned(table))
        why = [f"{op} in {b}: {v.why}" for b, by_op in by_backend.items() for op, v in by_op.items() if v.why]
        parts += ["\n".join(line[:300] for line in why)] if why else []
    return "\n\n".join(parts)


def _of_unit(row: dict, unit: str) -> bool:
    """Rows of smoke and steps are of several units; of other stages all are of one file."""
    if row["stage"] == "steps":
        return row.get("shape", row.get("item")) == unit
    if row["stage"] == "smoke":
        return unit in ("all", VARIANTS[row["item"].rsplit(", ", 3)[0]])
    return True


def aligned(table: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table)
