"""Rows of a study whose leakage is known, and the file that holds them."""

from __future__ import annotations

import json
from pathlib import Path

from sgtm.sweep.table import LOSSES

FORGET = 600_000.0


def loss_of(tokens: float) -> float:
    """Forget loss of a model without masks that was trained on so many forget tokens."""
    return 2 + 5 * (1 + tokens / 1e4) ** -0.3


def row(name: str, four: tuple[float, ...], *, undiscovered: float | None = None, masks: bool = True, seeds: int = 3):
    """A variant whose seeds differ by a hundredth of a nat; undiscovered: forget tokens without their label."""
    each = []
    for seed in range(seeds):
        losses = {loss: value + 0.01 * (seed - (seeds - 1) / 2) for loss, value in zip(LOSSES, four, strict=True)}
        half = {loss: 1.5 * value for loss, value in losses.items()}
        evaluations = [{"tokens": 500, **half}, {"tokens": 1000, **losses}]
        run = {"run": f"{name}-s{seed}", "seed": seed, **losses}
        each.append({**run, "evaluations": evaluations, "residual": {"retain": 10.0 + seed, "forget:es": 3.0}})
    if not masks:
        shares = {"forget:es": undiscovered} if undiscovered else {}
    else:
        shares = {"forget:es": FORGET - (undiscovered or 0.0), "unlabeled": undiscovered or 0.0}
    trained = {"retain": {"retain": 2e6}, "forget:es": shares}
    settings = {"masking.strategy": "sgtm" if masks else "none", "train.seed": 0, "train.steps": 10}
    origin = {"device": "a device", "commit": "c0ffee", "time": "2026-11-29T00:00:00Z"}
    counts = {"finished": seeds, "runs": seeds, "tokens": 1000, "parameters": 1_000_000}
    about = {"variant": name, "masks": masks, **counts}
    return {**about, "trained": trained, "settings": settings, "seeds": each, **origin}


def standard(tokens: float) -> dict:
    """A model without masks that saw so many forget tokens."""
    loss = loss_of(tokens)
    return row(f"standard-{tokens:g}", (3.0, loss, 3.0, loss), undiscovered=tokens, masks=False)


ATTACK = "forget, constant, lr 0.001"


def tampered(name: str = "paper", seed: int = 0, losses: tuple[float, ...] = (8.0, 7.0, 6.0), attack: str = ATTACK):
    """The losses of one attack, of 100 tokens a step, after 0, 1, 2, 4, 8, ... steps."""
    points = [(2**n // 2, loss) for n, loss in enumerate(losses)]
    curve = [{"step": step, "tokens": step * 100, "forget": y, "error": 0.1, "retain": 3.0} for step, y in points]
    about = {"tampered": name, "seed": seed, "condition": "without es", "sequences": 9, "tokens": 100}
    return {**about, "curve": curve, "attacks": {attack: points}}


def rows() -> list[dict]:
    """Standard models, two that leak nothing and all, one with complete labels, and two tamper curves."""
    models = [standard(tokens) for tokens in (0.0, 1e4, 3e4, 1e5, FORGET)]
    models.append(row("safe", (3.1, 3.2, 3.3, loss_of(0) + 1), undiscovered=1e5))
    models.append(row("ignored", (3.1, 3.2, 3.3, loss_of(1e5)), undiscovered=1e5))
    models.append(row("complete", (3.1, 3.2, 3.3, loss_of(1e4)), undiscovered=0.0))
    return [*models, tampered(), tampered(seed=1, losses=(7.0, 6.0, 5.0))]


def two_sizes() -> list[dict]:
    """The models of `rows`, and models of another shape with the same leakage, all of whose losses are a nat higher."""
    lines = rows()[:-2]
    for line in rows()[:-2]:
        settings = {**line["settings"], "model.hidden_size": 512}
        seeds = [{**seed, **{loss: seed[loss] + 1 for loss in LOSSES}} for seed in line["seeds"]]
        name = f"large-{line['variant']}"
        lines.append({**line, "variant": name, "settings": settings, "seeds": seeds, "parameters": 4_000_000})
    return lines


def write_rows(file: Path, lines: list[dict]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
