"""Other runs beside a run: the losses of unmasked and filtered training, and compute ratios to them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sgtm.config.load import load_run_config
from sgtm.config.schema import Config
from sgtm.report.ratios import Ratios, check_comparable, compute_ratios
from sgtm.report.record import RunRecord, read_record
from sgtm.words import counted


@dataclass(frozen=True)
class RunComparison:
    """Runs to show beside another, under the names of their columns.

    losses  of each run's full model, by category, nats per token
    errors  their standard errors over the documents, where they were recorded
    ratios  compute ratios to each curve, by the names of the runs that make it
    notes   what each run is, and what of it could not be compared; sentences
    """

    losses: dict[str, dict[str, float]]
    errors: dict[str, dict[str, float]]
    ratios: dict[str, Ratios]
    notes: list[str]


def compare(run: Path, others: Sequence[Path]) -> RunComparison:
    """`others` beside `run`.

    Losses are those of the same evaluation: of `sgtm eval` on the same sequences where all have it, else of the last
    one in training, and a note names what differs. Runs that differ in their length alone make one curve for the
    compute ratios, by the last evaluation of each; a single one makes a curve by all its evaluations in training.

    Raises ValueError for runs that cannot be compared, or that were not evaluated.
    """
    config, mine = load_run_config(run), read_record(run)
    seen: set[Path] = set()
    for other in others:
        if other.resolve() == run.resolve():
            raise ValueError(f"--baseline {other} is the run itself; give another run")
        if other.resolve() in seen:
            raise ValueError(f"--baseline {other} is given twice")
        seen.add(other.resolve())
        check_comparable(run, config, other)
    names, compared = _names(others), RunComparison({}, {}, {}, [])
    curves: dict[str, list[Path]] = {}
    for other, name in names.items():
        other_config, record = load_run_config(other), read_record(other)
        evaluation, differs = _evaluation(mine, record)
        losses = evaluation.get("losses", {}).get("full")
        if not losses:
            raise ValueError(
                f"{other} was not evaluated: its metrics.jsonl has no eval lines, and it has no summary.json; "
                f"sgtm eval {other}"
            )
        compared.losses[name] = {category: loss for category, loss in losses.items() if loss is not None}
        compared.errors[name] = evaluation.get("errors", {}).get("full", {})
        compared.notes.append(f"{name}: {_about(other_config, evaluation)}{differs}.")
        curves.setdefault(_training(other_config), []).append(other)
    for of_curve in curves.values():
        title = ", ".join(names[other] for other in of_curve)
        try:
            compared.ratios[title] = compute_ratios(run, of_curve)
        except ValueError as error:
            compared.notes.append(f"No compute ratio to {title}: {error}.")
    return compared


def _names(others: Sequence[Path]) -> dict[Path, str]:
    """A name for each run: its own, or its directory where two have the same."""
    own = [load_run_config(other).name for other in others]
    return {o: name if own.count(name) == 1 else str(o) for o, name in zip(others, own, strict=True)}


def _evaluation(mine: RunRecord, other: RunRecord) -> tuple[dict, str]:
    """The evaluation of `other` to show beside that of `mine`, and how it differs."""
    measured, split = (mine.summary.get(key) for key in ("measured", "split"))
    if measured and measured == other.summary.get("measured") and split == other.summary.get("split"):
        return other.summary, ""  # in the same order: the same sequences
    in_training = other.evals[-1] if other.evals else {}
    if "in_training" in mine.summary or "in_training" in other.summary:
        if in_training and "in_training" in mine.summary:
            return in_training, ""
        missing = mine if "in_training" in mine.summary else other
        return other.summary, f"; evaluated on other sequences than the run; for the same ones: sgtm eval {missing.run}"
    same = all(mine.summary.get(key) == other.summary.get(key) for key in ("split", "sequences"))
    return other.summary, "" if same else "; evaluated on other sequences than the run (--split, --sequences)"


def _about(config: Config, evaluation: dict) -> str:
    """'without masks, es left out, 1,843,200 tokens'."""
    strategy, left_out = config.masking.strategy, [c for c, factor in config.data.upsample.items() if factor == 0]
    steps, all_steps = evaluation.get("step", evaluation.get("steps", config.train.steps)), config.train.steps
    words = ["trained without masks" if strategy == "none" else f"trained with strategy {strategy}"]
    words += [f"{', '.join(left_out)} left out"] if left_out else []
    words += [f"token filter {config.data.token_filter}"] if config.data.token_filter != "off" else []
    words.append(counted(steps * config.train.tokens_per_step, "token"))
    words += [f"at step {steps} of {all_steps}"] if steps != all_steps else []
    return ", ".join(words)


def _training(config: Config) -> str:
    """What a run trains on and how, whatever its length and seed."""
    data = config.data.model_dump(mode="json", include={"upsample", "channel", "both_ways", "schedule", "token_filter"})
    return json.dumps([config.masking.strategy, data], sort_keys=True)
