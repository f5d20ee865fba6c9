"""A study: rows of sweeps, read back from a sweep's folder or a results file, with intervals over the seeds.

Everything here follows from the rows alone (sgtm/sweep/table.py), so that a committed file gives the figures again.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sgtm.config.model import ModelConfig, Section
from sgtm.config.reference import flat
from sgtm.config.schema import Config
from sgtm.evaluation.leakage import TokenCurve, leakage
from sgtm.run.environment import last_environment
from sgtm.sweep.examined import examination_rows
from sgtm.sweep.table import LOSSES, SIX
from sgtm.sweep.tampered import tamper_rows

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t by degrees of freedom, from 1; more of them take the last, which is too wide."""


class Interval(NamedTuple):
    """Mean over seeds, and half of its 95 % confidence interval by Student's t; None with one seed."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")


def interval(values: Sequence[float]) -> Interval | None:
    """None without a value, or where one is not finite."""
    if not values or not all(math.isfinite(value) for value in values):
        return None
    if len(values) == 1:
        return Interval(values[0], None)
    quantile = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    return Interval(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values)))


@dataclass(frozen=True)
class Variant:
    """A row of a table.

    masks       whether domains can be removed; else the full model is a baseline for the ablated ones
    tokens      of a run
    parameters  of the full model; rows of older versions have none
    trained     tokens by true and applied label; rows of older versions have none
    settings    values by dotted key of the config, defaults of keys that an older version lacked among them; rows of
                the oldest versions have none
    seeds       for each finished run its seed, four losses, and where they were kept evaluations and residual
    origin      device, commit and time of the training, where they are recorded
    """

    name: str
    masks: bool
    tokens: int
    parameters: int | None
    trained: dict[str, dict[str, float]]
    settings: dict[str, object]
    seeds: tuple[dict, ...]
    origin: dict[str, str]

    @property
    def served(self) -> str:
        """The model that is served without the domains: `ablated`, or `full` of one that was trained without masks."""
        return "ablated" if self.masks else "full"

    def values(self, loss: str) -> list[float]:
        return [math.nan if seed.get(loss) is None else seed[loss] for seed in self.seeds]

    def loss(self, loss: str) -> Interval | None:
        return interval(self.values(loss))

    def curve(self, model: str, data: str = "retain") -> list[tuple[int, Interval, Interval]]:
        """(tokens, loss on `data`, forget loss) of a model at the evaluations that all seeds have."""
        by_tokens: dict[int, list[dict]] = {}
        for seed in self.seeds:
            for line in seed.get("evaluations", ()):
                by_tokens.setdefault(line["tokens"], []).append(line)
        points = []
        for tokens, lines in sorted(by_tokens.items()):
            other, forget = (
                interval([math.nan if line.get(name) is None else line[name] for line in lines])
                for name in (f"{model}_{data}", f"{model}_forget")
            )
            if other and forget and len(lines) == len(self.seeds):
                points.append((tokens, other, forget))
        return points

    @property
    def shape(self) -> tuple[str, ...]:
        """Settings of the model: equal for models of one shape."""
        return tuple(f"{key} {value}" for key, value in sorted(self.settings.items()) if key.startswith("model."))

    @property
    def retained(self) -> float:
        """Tokens of the training that are not a domain's."""
        return retained_tokens(self.trained)

    @property
    def undiscovered(self) -> float | None:
        """Forget tokens that retain weights were trained on: those without their label, and those with the label
        `open:DOMAIN`. None where that is not recorded."""
        if not self.trained:
            return None
        rows = {true: row for true, row in self.trained.items() if true.startswith("forget:")}
        labelled = sum(row.get(true, 0.0) for true, row in rows.items()) if self.masks else 0.0
        return sum(sum(row.values()) for row in rows.values()) - labelled


class Study(NamedTuple):
    """
    name      of the folder or file
    variants  in the order of the rows
    tampered  worst-case tamper curves (sgtm/sweep/tampered.py)
    examined  examinations (sgtm/sweep/examined.py)
    """

    name: str
    variants: tuple[Variant, ...]
    tampered: tuple[dict, ...] = ()
    examined: tuple[dict, ...] = ()

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of those that the page shows: four, or six where a variant has adjacent ones."""
        return SIX if any(variant.loss("full_adjacent") for variant in self.variants) else LOSSES


def read_study(path: Path) -> Study:
    """Of a sweep's folder, with the tamper curves of the runs in it, or of a file of rows.

    Raises ValueError for a folder without a table, and for damaged files.
    """
    folder = path if path.is_dir() else None
    file = path / "table.jsonl" if folder else path
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}; `sgtm sweep FILE.yaml --table` writes a sweep's table") from None
    if not lines:
        raise ValueError(f"{file} has no row")
    variants: list[Variant] = []
    tampered, examined = (tamper_rows(folder), examination_rows(folder)) if folder else ([], [])
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if "tampered" in row:
                _ = row["seed"], row["condition"], [(point["step"], point["forget"]) for point in row["curve"]]
                tampered.append(row)
            elif "examined" in row:
                _ = row["seed"], row["domain"], [dict(by_model) for by_model in row["values"].values()]
                examined.append(row)
            elif "chosen" in row:  # a setting of a grid
                continue
            elif row["seeds"]:
                variants.append(_variant(row, folder))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}, line {number}: not a row of a sweep's table.jsonl ({error!r})") from None
    return Study(path.name, tuple(variants), tuple(tampered), tuple(examined))


def _variant(row: dict, folder: Path | None) -> Variant:
    origin = row if "commit" in row else _origin(folder, row) if folder else {}
    return Variant(
        name=row["variant"],
        masks=row["masks"],
        tokens=row["tokens"],
        parameters=row.get("parameters"),
        trained=row.get("trained", {}),
        settings=_defaults() | row["settings"] if row.get("settings") else {},
        seeds=tuple({**dict.fromkeys(SIX), **seed} for seed in row["seeds"]),
        origin={key: str(origin[key]) for key in ("device", "commit", "time") if origin.get(key)},
    )


@cache
def _defaults() -> dict[str, object]:
    """Of all keys that have one, by dotted key."""
    model = {key: field.default for key, field in ModelConfig.model_fields.items() if not field.is_required()}
    sections = {key: field.default for key, field in Config.model_fields.items() if isinstance(field.default, Section)}
    return flat({"model": model} | {key: section.model_dump(mode="json") for key, section in sections.items()})


def _origin(folder: Path, row: dict) -> dict:
    starts = filter(None, (last_environment(folder / seed["run"]) for seed in row["seeds"]))
    return max(starts, key=lambda one: one["time"], default={})


def examined_with(row: dict) -> str:
    """The settings of an examination, in words."""
    sequences = (
        f"up to {row['sequences']} sequences of each category"
        if row.get("sequences")
        else "all sequences (a sample for context and probes)"
    )
    text = f"{sequences} of split {row.get('split') or 'test'}"
    if row.get("texts"):
        text += f", passages of a file (SHA-256 {row['texts'][:12]})"
    elif row.get("passages"):
        text += f", {row['passages']} passages"
    if row.get("fit_sequences"):
        text += f", calibrated on {row['fit_sequences']} sequences of each category"
    if row.get("control"):
        text += f", control {row['control']}" + " (which may have seen the domain)" * bool(row.get("control_warning"))
    return text


EXAMINATION = (lambda row: row["domain"], examined_with)
"""What two examinations of a variant may differ in, in words."""


def examinations(study: Study) -> dict[str, dict[str, dict[str, Interval]]]:
    """By variant (and its domain and the settings of the examination, where there are several), name of the number and
    model, over the seeds; of a number that a seed lacks, over the others."""
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    several = [len({part(row) for row in study.examined}) > 1 for part in EXAMINATION]
    for row in study.examined:
        parts = [part(row) for part, needed in zip(EXAMINATION, several, strict=True) if needed]
        variant = ", ".join([row["examined"], *parts])
        for name, by_model in row["values"].items():
            for model, value in by_model.items():
                values.setdefault(variant, {}).setdefault(name, {}).setdefault(model, []).append(value)
    return {
        variant: {
            name: {model: mean for model, of in by_model.items() if (mean := interval(of))}
            for name, by_model in by_name.items()
        }
        for variant, by_name in values.items()
    }


def retained_tokens(trained: Mapping[str, Mapping[str, float]]) -> float:
    """trained: tokens of a training by true and applied label; those whose true label is no domain's."""
    return sum(sum(row.values()) for true, row in trained.items() if not true.startswith("forget:"))


def standard_curve(variants: Iterable[Variant], seed: int | None = None) -> TokenCurve | None:
    """Forget loss of the models trained without masks by the forget tokens they saw: what leakage is read from. The
    variants are of one shape. seed: whose losses; None: means over the seeds.

    Models that were trained on 5 % more or less retain tokens than the median variant are left out, such as the same
    baseline trained for other numbers of steps. None where the rest are too few, or where none saw no forget token.
    """
    points = standard_points(variants, seed)
    try:
        return TokenCurve(*zip(*points, strict=True)) if points else None
    except ValueError:
        return None


def standard_points(variants: Iterable[Variant], seed: int | None = None) -> list[tuple[float, float]]:
    """(forget tokens, forget loss) of `standard_models`; seed as in `standard_curve`."""
    points = []
    for tokens, variant in standard_models(variants):
        own = [each["full_forget"] for each in variant.seeds if each["seed"] == seed]
        points.append((tokens, own[0] if own else statistics.fmean(variant.values("full_forget"))))
    return sorted(points)


def standard_models(variants: Iterable[Variant]) -> list[tuple[float, Variant]]:
    """(forget tokens, variant) of those that `standard_curve` goes through, by rising tokens."""
    variants = [variant for variant in variants if variant.trained]
    median = statistics.median([variant.retained for variant in variants] or [0.0])
    models = [
        (variant.undiscovered, variant)
        for variant in variants
        if not variant.masks and abs(variant.retained - median) < 0.05 * median and variant.loss("full_forget")
    ]
    return sorted(((tokens, variant) for tokens, variant in models if tokens is not None), key=lambda model: model[0])


class VariantLeakage(NamedTuple):
    """tokens  token equivalent of the ablated model's forget loss; ratio to the undiscovered forget tokens, None where
    there were none; extrapolated: for a seed or more."""

    tokens: Interval
    ratio: Interval | None
    extrapolated: bool


def leakages(variants: Sequence[Variant]) -> dict[str, VariantLeakage]:
    """Of each masked variant for which there is a curve of models of its shape. A seed's leakage is read from models of
    the same seed; where one of them has no such run, from the mean over its seeds, whose error is not in the
    intervals."""
    by_shape: dict[tuple[str, ...], list[Variant]] = {}
    for variant in variants:
        by_shape.setdefault(variant.shape, []).append(variant)
    by_name = {}
    for variant in variants:
        losses = variant.values("ablated_forget")
        if not variant.masks or variant.undiscovered is None or not all(map(math.isfinite, losses)):
            continue
        curves = [standard_curve(by_shape[variant.shape], seed["seed"]) for seed in variant.seeds]
        pairs = zip(losses, curves, strict=True)
        seeds = [leakage(loss, curve, variant.undiscovered) for loss, curve in pairs if curve]
        if len(seeds) < len(losses):
            continue
        tokens = interval([seed.tokens for seed in seeds])
        ratios = [seed.ratio for seed in seeds if seed.ratio is not None]
        if tokens:
            extrapolated = any(seed.extrapolated for seed in seeds)
            by_name[variant.name] = VariantLeakage(tokens, interval(ratios), extrapolated)
    return by_name


def absorptions(variants: Sequence[Variant]) -> dict[str, list[tuple[float, Interval]]]:
    """Of each masked variant, (share of the training, absorption) at its evaluations.

    Absorption is the share of what the full model has learned of forgotten data that its domains' groups hold: (ablated
    forget loss - full forget loss) / (forget loss of a model that has seen none - full forget loss), the last of the
    model of the same shape that was trained without masks and without forget tokens, at the same share of its training.
    1: without its groups the model knows no more than that one; 0: as much as with them. Variants are left out for
    which there is no such model, and evaluations at which the full model is no better than it.
    """
    by_name = {}
    for variant in variants:
        if not variant.masks or (unseen := _unseen(variants, variant.shape)) is None:
            continue
        curve = unseen.curve("full")
        shares, losses = [tokens / unseen.tokens for tokens, _, _ in curve], [loss.mean for _, _, loss in curve]
        by_share: dict[float, list[float]] = {}
        for line in (line for seed in variant.seeds for line in seed.get("evaluations", ())):
            share, full, ablated = line["tokens"] / variant.tokens, line["full_forget"], line["ablated_forget"]
            if full is not None and ablated is not None and (learned := np.interp(share, shares, losses) - full) > 0:
                by_share.setdefault(share, []).append(float((ablated - full) / learned))
        whole = [share for share, values in sorted(by_share.items()) if len(values) == len(variant.seeds)]
        points = [(share, value) for share in whole if (value := interval(by_share[share]))]
        if points:
            by_name[variant.name] = points
    return by_name


def _unseen(variants: Sequence[Variant], shape: tuple[str, ...]) -> Variant | None:
    """The first of this shape that was trained without masks and without forget tokens, and evaluated on the way."""
    alike = [variant for variant in variants if variant.shape == shape and not variant.masks]
    return next((v for v in alike if v.trained and v.undiscovered == 0 and v.curve("full")), None)


def differing_settings(variants: Sequence[Variant]) -> dict[str, dict[str, object]]:
    """By variant the keys in which any two variants differ, `train.seed` and `data.seed` aside."""
    keys = dict.fromkeys(key for variant in variants for key in variant.settings)
    ours = [key for key in keys if key not in ("train.seed", "data.seed")]
    differ = [key for key in ours if len({json.dumps(variant.settings.get(key)) for variant in variants}) > 1]
    return {variant.name: {key: variant.settings.get(key) for key in differ} for variant in variants}
