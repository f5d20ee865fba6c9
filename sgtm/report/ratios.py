"""Compute ratios of a run to the baselines that it is compared with (sgtm/evaluation/compute_ratio.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sgtm.config.load import load_run_config
from sgtm.config.schema import Config
from sgtm.data.loader import isolates_documents
from sgtm.evaluation.compute_ratio import LEAST, ComputeRatio, LearningCurve
from sgtm.run.checkpoint import find_latest, read_manifest
from sgtm.run.metrics import read_metrics

Ratios = dict[str, dict[str, ComputeRatio]]


def categories_of(ratios: Ratios) -> list[str]:
    """All categories, in order; one whose loss was not finite is missing under that condition."""
    return list(dict.fromkeys(category for by_category in ratios.values() for category in by_category))


def compute_ratios(run: Path, baselines: Sequence[Path]) -> Ratios:
    """Ratios of a run's last evaluation in training, by removed set and category, to the full model of the baselines.

    baselines  one run: all its evaluations in training make the curve (train.eval_every); several, of different
               lengths: the last evaluation of each
    Compute is training tokens. All evaluations are those of `metrics.jsonl`, on train.eval_sequences of each
    category; what `sgtm eval` measures on others is not compared. A category whose loss does not fall in the baselines,
    as that of a domain in filtered training, has no ratio. Raises ValueError for runs that have no evaluation, that
    cannot be compared, and where no category has a ratio.
    """
    config, (_, losses) = load_run_config(run), _evaluations(run)[-1]
    points = []
    for baseline in baselines:
        check_comparable(run, config, baseline)
        evaluations = _evaluations(baseline)
        points += evaluations if len(baselines) == 1 else evaluations[-1:]
    ratios: Ratios = {}
    problem = None
    for removal, by_category in losses.items():
        for category, loss in by_category.items():
            mine = [(tokens, other["full"].get(category)) for tokens, other in points]
            mine = [(tokens, other) for tokens, other in mine if other is not None]
            if loss is not None:
                try:
                    curve = LearningCurve(*zip(*mine, strict=True)) if mine else LearningCurve((), ())
                except ValueError as error:
                    few = f"give {LEAST} of different lengths"
                    if len(baselines) == 1:
                        every = max(1, load_run_config(baselines[0]).train.steps // LEAST)
                        few = f"train it with --train.eval_every {every}"
                    problem = problem or f"{category}: {error}" + f"; {few}" * (len(mine) < LEAST)
                    continue
                ratios.setdefault(removal, {})[category] = curve.ratio(loss)
    if not ratios and problem:
        raise ValueError(problem)
    return ratios


def _evaluations(run: Path) -> list[tuple[int, dict]]:
    """(tokens, losses) of each evaluation in training."""
    config, by_step = load_run_config(run), {}
    for line in read_metrics(run / "metrics.jsonl"):
        if line["kind"] == "eval":
            by_step[line["step"]] = line["losses"]
    if not by_step:
        raise ValueError(f"{run} was not evaluated in training: no eval lines in metrics.jsonl")
    return [(step * config.train.tokens_per_step, by_step[step]) for step in sorted(by_step)]


def check_comparable(run: Path, config: Config, baseline: Path) -> None:
    """Raises ValueError where a loss of one cannot be compared with the compute of the other."""
    other = load_run_config(baseline)
    facts = {
        **{f"model.{key}": (ours, getattr(other.model, key)) for key, ours in config.model},
        "train.eval_sequences": (config.train.eval_limit, other.train.eval_limit),
        "isolation of documents": (isolates_documents(config.data), isolates_documents(other.data)),
        "corpus": _corpora((run, config), (baseline, other)),
    }
    for what, (ours, theirs) in facts.items():
        if ours != theirs:
            raise ValueError(f"{run} and {baseline} cannot be compared: {what} is {ours} and {theirs}")


def _corpora(*runs: tuple[Path, Config]) -> tuple[str, ...]:
    """Each run's corpus: its path, and its fingerprint if all have a checkpoint, which holds it."""
    paths = [config.data.path for _, config in runs]
    newest = [checkpoint for run, _ in runs if (checkpoint := find_latest(run))]
    if len(newest) < len(runs):
        return tuple(paths)
    fingerprints = [read_manifest(checkpoint)["corpus"] for checkpoint in newest]
    if len(set(fingerprints)) == 1:  # the same data, wherever they lie
        return tuple(fingerprints)
    return tuple(f"{path} (fingerprint {one:.8})" for path, one in zip(paths, fingerprints, strict=True))
