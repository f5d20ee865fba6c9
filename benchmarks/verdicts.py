"""Verdicts of a run's checks on each op, and which measurements may be reported because of them.

A measurement of an op is reported only if the op passed `smoke` in that backend and none of its tests failed; that of a
whole step, which takes every op, only if all ops did. Everything here works on rows as the stages of gpu.py write them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from journal import last_by

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
PUBLIC = "public"  # backend of rows that hold nothing of ours


@dataclass(frozen=True)
class Verdict:
    """smoke, tests: `passed`, `failed`, or `not run` (or not to the end); why: what failed, empty where nothing did."""

    smoke: str
    tests: str
    why: str = ""

    @property
    def reported(self) -> bool:
        return self.smoke == PASSED and self.tests != FAILED


# Variants of op_cases.py by op, and the masks that each is checked under.
VARIANTS = {
    "linear_in": "linear",
    "linear_out": "linear",
    "activation": "mlp",
    "linear_gelu": "mlp",
    "attention": "attention",
    "attention, window": "attention",
    "attention, documents": "attention",
    "norm": "norm",
    "embedding": "embedding",
    "linear_cross_entropy": "cross_entropy",
    "adamw": "adamw",
}
OPS = tuple(dict.fromkeys(VARIANTS.values()))  # those of sgtm_kernels.dispatch, which imports torch
MASKS = ("unmasked", "25 % forget", "25 % forget in every sequence", "pure forget")


def smoke_item(variant: str, shape: str, mask: str, backend: str) -> str:
    """Name of an item of `smoke`; all that is known of one whose process crashed."""
    return f"{variant}, {shape}, {mask}, {backend}"


def verdicts(rows: Sequence[dict], backend: str) -> dict[str, Verdict]:
    """By op, from the rows of the stages `smoke` and `tests`; of an item with several rows the last counts."""
    smoke = {}
    for row in latest([row for row in rows if row.get("stage") == "smoke"]):
        variant, shape, mask, of = row["item"].rsplit(", ", 3)
        if of == backend:
            smoke.setdefault(VARIANTS[variant], {})[variant, shape, mask] = row
    tests = [row for row in rows if row.get("stage") == "tests"]
    return {op: _verdict(op, smoke.get(op, {}), tests) for op in OPS}


def _verdict(op: str, smoke: dict[tuple[str, str, str], dict], tests: list[dict]) -> Verdict:
    wrong = [f"{row['item']}: {row['error']}" for row in smoke.values() if row["outcome"] != "ok"]
    variants = [variant for variant, of in VARIANTS.items() if of == op]
    complete = any(
        all((variant, shape, mask) in smoke for variant in variants for mask in MASKS) for _, shape, _ in smoke
    )
    outcomes = {row["item"]: row["outcome"] for row in latest(tests)}
    own = [row["item"] for row in latest(tests) if row.get("op") == op]
    red = [row["test"] for row in _open(tests) if _concerns(row, op)]
    red = red or [file for file in own if outcomes[file] != "ok"]
    return Verdict(
        smoke=FAILED if wrong else PASSED if complete else NOT_RUN,
        tests=FAILED if red else PASSED if own else NOT_RUN,
        why="; ".join(wrong[:1] + red[:1]),
    )


def _open(tests: list[dict]) -> list[dict]:
    """Failed tests whose file has not passed since."""
    failures: list[dict] = []
    for row in tests:
        if "test" in row:
            failures.append(row)
        elif row["outcome"] == "ok":
            failures = [failed for failed in failures if failed["file"] != row["item"]]
    return failures


def _concerns(row: dict, op: str) -> bool:
    """Whether a failed test is of an op: its file is, or its name has the op's."""
    return row["file"].startswith(f"test_{op}") or op in row["test"]


def latest(rows: Sequence[dict]) -> list[dict]:
    """The last row of each item."""
    return last_by([row for row in rows if "item" in row], "item")


def admitted(rows: Sequence[dict], checks: Sequence[dict]) -> tuple[list[dict], dict[str, str]]:
    """Rows that may be reported, and why those of an op (or of whole steps) in a backend may not, by its name.

    rows    of ops have `op` and `backend`, those of whole steps `backend` and no `op`
    checks  rows of `smoke` and `tests` of the same run
    """
    by_backend: dict[str, dict[str, Verdict]] = {}
    reported, refused = [], {}
    for row in rows:
        backend = row.get("backend", PUBLIC)
        if backend == PUBLIC:
            reported.append(row)
            continue
        by_op = by_backend.setdefault(backend, verdicts(checks, backend))
        needed = {row["op"]: by_op[row["op"]]} if "op" in row else by_op
        wrong = {op: verdict for op, verdict in needed.items() if not verdict.reported}
        if not wrong:
            reported.append(row)
            continue
        what = f"{row['op']} in {backend}" if "op" in row else f"whole steps in {backend}"
        reasons = [f"{op}: {verdict.why or 'smoke ' + verdict.smoke}" for op, verdict in wrong.items()]
        refused[what] = "; ".join(reasons) if len(reasons) < 3 else f"{'; '.join(reasons[:2])}; {len(reasons) - 2} more"
    return reported, refused
