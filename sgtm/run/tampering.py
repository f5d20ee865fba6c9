"""Tamper curves of a run: its attacks, and the rows of `tamper.jsonl`.

The file holds a row for every attack and evaluated step, and is written whole after every attack. A row has everything
that its losses depend on, so that an attack whose rows are there need not be run again. Every run keeps its own rows: a
control is attacked once, however many runs are compared to it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from sgtm.evaluation.subject import Subject
from sgtm.evaluation.tampering import Attack, Documents, HeldOut, Reached, tamper
from sgtm.files import write_atomically
from sgtm.masking.labels import removal_name
from sgtm.run.opened import OpenedRun
from sgtm.run.tamper_plan import Plan

FILE = "tamper.jsonl"
IDENTITY = ("checkpoint", "weights", "condition", "domains", "sequences", "attack")
"""Keys of a row that say what its losses depend on."""


def attack_run(
    target: OpenedRun, plan: Plan, *, again: bool = False, note: Callable[[str], None] = lambda text: None
) -> list[Reached]:
    """Run the attacks of a plan whose rows `tamper.jsonl` lacks, in order, and return what each has reached.

    again  run all of them, and replace their rows
    note   is called with a line about every attack that is run

    Raises ValueError for a damaged `tamper.jsonl`.
    """
    path = target.run / FILE
    stored, subject = _read(path), None
    reached: list[Reached] = []
    for number, attack in enumerate(plan.attacks, 1):
        identity = _identity(target, plan, attack)
        key = _key(identity)
        if again or [row["step"] for row in stored.get(key, ())] != list(attack.evaluated):
            subject = subject or target.subject(target.removed(plan.domains))
            stored[key] = _attack(subject, plan, attack, identity)
            rows = (row for rows in stored.values() for row in rows)
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
            note(f"attack {number} of {len(plan.attacks)} on {target.run}: {attack}: {_outcome(stored[key])}")
        reached += [_reached(attack, row) for row in stored[key]]
    return reached


class AttackGrid(NamedTuple):
    """Attacks of as many tokens a step, measured on the same held-out text: at most `sequences` of each category."""

    sequences: int
    reached: list[Reached]


def read_grids(run: Path) -> dict[str, AttackGrid]:
    """What the attacks in a run's `tamper.jsonl` have reached, by what the run was attacked without.

    Attacks on another checkpoint than the last of a condition are left out. Of grids that differ in the domains, the
    held-out text or the tokens of a step, whose losses cannot be compared, the one of the most steps is taken, of
    equal ones the last. Raises ValueError for a damaged file.
    """
    by_condition: dict[str, list[list[dict]]] = {}
    for rows in _read(run / FILE).values():
        by_condition.setdefault(rows[0]["condition"], []).append(rows)
    grids: dict[str, AttackGrid] = {}
    for condition, attacks in by_condition.items():
        last = attacks[-1][0]
        alike: dict[str, list[list[dict]]] = {}
        for rows in attacks:
            if all(rows[0][name] == last[name] for name in ("checkpoint", "weights")):
                settings = [rows[0]["domains"], rows[0]["sequences"], rows[0]["attack"]["tokens"]]
                alike.setdefault(json.dumps(settings), []).append(rows)
        most = max(reversed(alike.values()), key=lambda grid: sum(rows[0]["attack"]["steps"] for rows in grid))
        reached = [_reached(_attack_of(row), row) for rows in most for row in rows]
        grids[condition] = AttackGrid(most[0][0]["sequences"], reached)
    return grids


def full_loss(target: OpenedRun, plan: Plan) -> float:
    """Held-out loss of a run's full model on what the plan's curves are of."""
    return plan.measure(target.subject(())).forget.value


def _reached(attack: Attack, row: dict) -> Reached:
    loss = math.nan if row["forget"] is None else row["forget"]
    return Reached(attack, row["step"], loss, row["forget_error"], row["retain"], _documents(row))


def _documents(row: dict) -> Documents | None:
    """Raises TypeError, KeyError or ValueError for what is no list of documents."""
    if (stored := row.get("documents")) is None:
        return None
    losses, targets = zip(*zip(stored["losses"], stored["targets"], strict=True), strict=True)
    math.fsum((*losses, *targets))
    return Documents(losses, targets)


def _attack_of(row: dict) -> Attack:
    stored = row["attack"]
    parts, evaluated = tuple(map(tuple, stored["parts"])), tuple(stored["evaluated"])
    return Attack(**{**stored, "parts": parts, "evaluated": evaluated})


def _attack(subject: Subject, plan: Plan, attack: Attack, identity: dict) -> list[dict]:
    """Rows of an attack; a loss that is not finite, or comes after a divergence, is None."""
    measured = {step: plan.measure(attacked) for step, attacked in tamper(subject, attack)}
    return [{**identity, "step": step, **_losses(measured.get(step), attack, step)} for step in attack.evaluated]


def _losses(measured: HeldOut | None, attack: Attack, step: int) -> dict:
    by_category = measured.categories if measured else {}
    retain = measured.retain if measured else None
    return {
        "tokens": step * attack.tokens,
        "forget": _finite(measured.forget.value) if measured else None,
        "forget_error": measured.forget.error if measured else None,
        "retain": _finite(retain.value) if retain else None,
        "retain_error": retain.error if retain else None,
        "losses": {name: _finite(loss.value) for name, loss in by_category.items()},
        "errors": {name: loss.error for name, loss in by_category.items()},
        "documents": measured.documents._asdict() if measured and math.isfinite(measured.forget.value) else None,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _outcome(rows: list[dict]) -> str:
    losses = [row["forget"] for row in rows if row["forget"] is not None]
    if not losses:
        return "forget loss not finite"
    lowest = f"forget loss {losses[0]:.3f} at step 0, lowest {min(losses):.3f}"
    return f"{lowest}; diverged" if len(losses) < len(rows) else lowest


def _identity(target: OpenedRun, plan: Plan, attack: Attack) -> dict:
    """What the losses of an attack depend on; as JSON has it."""
    identity = {
        "checkpoint": target.checkpoint.name,
        "weights": target.weights,
        "condition": removal_name(target.removed(plan.domains)),
        "domains": plan.domains,
        "sequences": plan.sequences,
        "attack": asdict(attack),
    }
    return json.loads(json.dumps(identity))


def _key(row: dict) -> str:
    return json.dumps([row[name] for name in IDENTITY], sort_keys=True)


def _read(path: Path) -> dict[str, list[dict]]:
    """Rows of every attack in the file, in order; none without a file."""
    stored: dict[str, list[dict]] = {}
    lines: Iterable[str] = path.read_text("utf-8").splitlines() if path.exists() else ()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            math.fsum(row[name] or 0 for name in ("step", "forget", "forget_error", "retain"))  # numbers or None
            _documents(row)
            stored.setdefault(_key(row), []).append(row)
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}, line {number}: not a row of an attack: {line[:80]!r}; put back a copy of the file, or "
                f"move it away to run all attacks again"
            ) from None
    return stored
