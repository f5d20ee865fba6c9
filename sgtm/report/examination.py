"""An examination (sgtm/run/examine.py) as numbers by name and model, and as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

Estimate = dict[str, float | None]  # value, and error where there is one
OVERFITTED = 0.02  # nats
Rows = Iterator[tuple[str, dict[str, Estimate]]]  # name, and by model


def print_examination(results: dict[str, Any], console: Console | None = None) -> None:
    """Print a table for each domain; losses are nats per token of held-out text."""
    console = console or Console()
    for domain, examined in results["domains"].items():
        rows = list(examination_rows(examined))
        models = list(dict.fromkeys(model for _, cells in rows for model in cells))
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        table.add_column(domain)
        for model in models:
            table.add_column(model, justify="right")
        for name, cells in rows:
            table.add_row(name, *(cells.get(model, "") for model in models))
        console.print(table, "")
    for line in overfitted(results):
        console.print(f"warning: {line}")
    if any("calibrated" in examined["measures"] for examined in results["domains"].values()):
        console.print("calibrated: biases that serve retained text may raise the loss; an attacker has the lower one")
    sequences = f", up to {results['sequences']} sequences of each category" if results["sequences"] else ""
    console.print(f"±: standard error over documents; nats per token of split {results['split']}{sequences}")
    console.print("the measures: docs/evaluation.md")


def overfitted(results: dict[str, Any]) -> Iterator[str]:
    """Of which models the biases of a calibration raise a retained loss by more than `OVERFITTED` nats."""
    for domain, examined in results["domains"].items():
        for model, one in examined["measures"].get("calibrated", {}).items():
            rises = {name: one["after"][name]["value"] - one["before"][name]["value"] for name in examined["retain"]}
            name = max(rises, key=lambda name: rises[name])
            if rises[name] > OVERFITTED:
                targets = sum(one["targets"][name] for name in examined["retain"])
                yield (
                    f"calibrated, {model}: the biases raise the loss on {name} by {rises[name]:.3f} nats: they were "
                    f"fitted to {targets:,} tokens of retained text, too few; its calibrated loss on {domain} is too "
                    f"high (--fit-sequences)"
                )


def examination_rows(examined: dict[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """(name, cells by model) of one domain's measures."""
    for name, by_model in examination_numbers(examined):
        yield name, {model: _cell(estimate) for model, estimate in by_model.items()}


def examination_numbers(examined: dict[str, Any]) -> Rows:
    """(name, value and error by model) of one domain's measures."""
    for measure, by_model in examined["measures"].items():
        yield from ROWS[measure](by_model, examined["forget"])


def _cell(estimate: Estimate) -> str:
    error = estimate.get("error")
    return f"{estimate['value']:.3f}" + ("" if error is None else f"±{error:.2g}")


def _calibrated(by_model: dict[str, Any], forget: list[str]) -> Rows:
    for category in forget:
        for name, when in (("loss", "before"), ("calibrated loss", "after")):
            yield f"{name}, {category}", {model: one[when][category] for model, one in by_model.items()}


def _recital(by_model: dict[str, Any], forget: list[str]) -> Rows:
    for key, name in (("extraction_strength", "extraction strength"), ("exact_memorisation", "exact memorisation")):
        yield name, {model: one[key] for model, one in by_model.items()}


def _membership(by_model: dict[str, Any], forget: list[str]) -> Rows:
    for category in forget:
        yield f"membership, ROC area, {category}", {model: one[category] for model, one in by_model.items()}


def _quantised(by_model: dict[str, Any], forget: list[str]) -> Rows:
    for bits in next(iter(by_model.values())):
        name = f"loss at {bits} bits" if bits.isdecimal() else f"loss {bits}"
        for category in forget:
            yield f"{name}, {category}", {model: one[bits][category] for model, one in by_model.items()}


def _context(by_model: dict[str, Any], forget: list[str]) -> Rows:
    for category in forget:
        yield f"gain by context, {category}", {model: one[category]["gain"] for model, one in by_model.items()}


def _probes(by_model: dict[str, Any], forget: list[str]) -> Rows:
    for category in forget:
        best = {
            model: min(one[category].values(), key=lambda probe: probe["chosen"])["fitted"]
            for model, one in by_model.items()
        }
        yield f"best linear probe, {category}", best


def _guided(by_strength: dict[str, Any], forget: list[str]) -> Rows:
    for strength, recited in by_strength.items():
        yield f"extraction strength, guided {strength}", {"full": recited["extraction_strength"]}


ROWS: dict[str, Callable[[dict[str, Any], list[str]], Rows]] = {
    "calibrated": _calibrated,
    "recital": _recital,
    "membership": _membership,
    "quantised": _quantised,
    "context": _context,
    "probes": _probes,
    "guided": _guided,
}
