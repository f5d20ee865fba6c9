"""The errors of the claims' measures, which no seed shows, against the committed rows."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
import pytest

from sgtm.evaluation.leakage import leakage
from sgtm.sweep.study import STUDENT, read_study, standard_curve

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CLAIMS, ARXIV = RESULTS / "cpu-epyc-2c" / "claims.jsonl", RESULTS / "cpu-epyc-2c" / "arxiv.jsonl"
SIZES = RESULTS / "cpu-xeon-2c" / "sizes.jsonl"
SMALL = 0.1
"""A leakage above that is read where the curve is flat."""


@pytest.fixture
def measures(benchmarks):
    import claim_measures

    return claim_measures


def test_the_error_of_a_line_covers_the_finished_models_of_other_lengths(measures):
    """Of the novels: every model that was trained to its end in fewer steps, at a retain loss that the line has."""
    study = read_study(CLAIMS)
    errors = []
    for variant in study.variants:
        names = [f"{variant.served}_{data}" for data in ("retain", "forget")]
        own = {seed["seed"]: seed for seed in variant.seeds}
        for short in measures.lengths(study, variant.name)[1:]:
            for seed in short.seeds:
                whole = own.get(seed["seed"]) or own[min(own)]
                retain, forget = zip(*sorted([each[n] for n in names] for each in whole["evaluations"]), strict=True)
                if retain[0] <= seed[names[0]] <= retain[-1]:
                    errors.append(seed[names[1]] - float(np.interp(seed[names[0]], retain, forget)))
    assert len(errors) >= 8 and 0.8 * measures.LINE_ERROR < max(map(abs, errors)) <= measures.LINE_ERROR


def test_the_error_of_a_curve_is_that_of_its_seed(measures):
    """Small leakages of the novels, each read from filtered models of several seeds: relative variances, pooled over
    the three shapes that have such models."""
    variance, freedom = 0.0, []
    for study in map(read_study, (CLAIMS, SIZES)):
        for shape in dict.fromkeys(variant.shape for variant in study.variants):
            alike = [variant for variant in study.variants if variant.shape == shape]
            leaking = [mine for mine in alike if mine.masks and mine.undiscovered]
            tokens = [
                read.tokens
                for mine in leaking
                for seed in mine.seeds
                if (read := leakage(seed["ablated_forget"], standard_curve(alike), mine.undiscovered)).ratio < SMALL
            ]
            models = measures.models_read(alike, max(tokens))
            seeds = set.intersection(*({seed["seed"] for seed in model.seeds} for model in models))
            curves, own = [standard_curve(alike, seed) for seed in seeds], []
            for mine in leaking if len(seeds) > 1 else ():
                for seed in mine.seeds:
                    read = [leakage(seed["ablated_forget"], curve, mine.undiscovered).ratio for curve in curves]
                    own += [statistics.variance(read) / statistics.fmean(read) ** 2] if max(read) < SMALL else []
            if own:
                variance += (len(seeds) - 1) * statistics.fmean(own)
                freedom.append(len(seeds) - 1)
    assert freedom == [2, 4, 4], "of claims, and of the smallest and the largest of sizes"
    half = STUDENT[min(sum(freedom), len(STUDENT)) - 1] * math.sqrt(variance / sum(freedom))
    assert 0.9 * measures.CURVE_ERROR < half <= measures.CURVE_ERROR, half


def test_the_error_of_a_sample_covers_the_model_that_was_measured_on_fewer_sequences(measures):
    """Of arXiv: the filtered models of 603 steps, beside those of other lengths, which were measured on all."""
    study = read_study(ARXIV)
    whole, *others = measures.lengths(study, "filtered")
    assert (
        {each.settings["train.eval_sequences"] for each in others} == {"all"} != whole.settings["train.eval_sequences"]
    )
    errors = []
    for seed in whole.seeds:
        points = [each for other in others for each in other.seeds if each["seed"] == seed["seed"]]
        retain, forget = zip(*sorted((each["full_retain"], each["full_forget"]) for each in points), strict=True)
        errors.append(abs(seed["full_forget"] - float(np.interp(seed["full_retain"], retain, forget))))
    assert len(errors) == 3 and 0.8 * measures.SAMPLE_ERROR < max(errors) <= measures.SAMPLE_ERROR
