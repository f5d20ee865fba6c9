"""A step: its learning rate at every step of the run, and what it counts."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from sgtm.config import load_config
from sgtm.config.schema import OptimizerConfig
from sgtm.data.batch import IGNORE, Batch
from sgtm.training.loop import _losses
from sgtm.training.step import StepTotals, group_norms, learning_rate, only, target_counts, train_step

CONFIG = OptimizerConfig(lr=2e-3, warmup_steps=10, warmup_start=0.1, final_lr=0.05)
TOTAL = 110
NAMES = ("unlabeled", "retain", "forget:es")


def test_corners():
    rates = {step: learning_rate(step, CONFIG, TOTAL) for step in (0, 5, 10, 60, 110)}
    expected = {0: 2e-4, 5: 1.1e-3, 10: 2e-3, 60: 2e-3 * (0.05 + 0.95 / 2), 110: 1e-4}
    assert rates == pytest.approx(expected, rel=1e-12)


def test_matches_the_formula_everywhere():
    for step in range(TOTAL):
        if step < 10:
            share = 0.1 + 0.9 * step / 10
        else:
            share = 0.05 + 0.95 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2
        assert learning_rate(step, CONFIG, TOTAL) == pytest.approx(2e-3 * share, rel=1e-12)


def test_a_share_of_the_steps_is_a_warm_up_of_that_many():
    share = CONFIG.model_copy(update={"warmup_steps": 0.09})
    for step in range(TOTAL):
        assert learning_rate(step, share, TOTAL) == learning_rate(step, CONFIG, TOTAL)
    assert [share.warmup(steps) for steps in (1, 5, 6, 30, 1000)] == [0, 0, 1, 3, 90]


def test_rises_then_falls_without_a_jump():
    rates = [learning_rate(step, CONFIG, TOTAL) for step in range(TOTAL + 1)]
    assert rates.index(max(rates)) == 10
    assert all(a < b for a, b in pairwise(rates[:11]))
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert max(abs(a - b) for a, b in pairwise(rates)) < 2e-3 * 0.1


@pytest.mark.parametrize("total", [1, 10, 11])
def test_short_runs_divide_by_nothing(total):
    config = CONFIG.model_copy(update={"warmup_steps": 0 if total == 1 else 10})
    rates = [learning_rate(step, config, total) for step in range(total + 5)]
    assert all(0 < rate <= 2e-3 for rate in rates)
    assert rates[-1] == pytest.approx(1e-4)


def test_skipped_steps_are_counted_and_their_losses_are_not():
    totals, engine = StepTotals(3, torch.device("cpu")), SimpleNamespace(all_reduce_sum=torch.clone)

    def step(*losses: float, finite: bool = True):
        for loss in losses:
            totals.add(torch.tensor([loss, 0.0, 0.0]), torch.tensor([1, 0, 0]))
        totals.end_step(finite)

    step(1.0, 2.0)
    step(math.nan, 5.0, finite=False)
    step(7.0, finite=False)
    assert (totals.skipped, totals.in_a_row) == (2, 2)
    copy = StepTotals(3, torch.device("cpu"))
    copy.restore([totals.state()], 0, 1)
    assert (copy.skipped, copy.in_a_row) == (2, 2)
    step(3.0)
    assert (totals.skipped, totals.in_a_row) == (2, 0)
    assert _losses(totals, engine, NAMES) == {"loss": 2.0, "loss/unlabeled": 2.0}
    totals.end_step(False, retain=True)  # a domain's update was skipped, the retain group's was not
    assert (totals.skipped, totals.in_a_row) == (3, 0)
    totals.skipped = 2
    step(4.0, finite=False)
    assert (totals.skipped, totals.in_a_row) == (3, 1) and math.isnan(_losses(totals, engine, NAMES)["loss"])


BATCH = Batch(
    input_ids=torch.arange(8).view(2, 4),
    targets=torch.tensor([[1, 2, 3, IGNORE], [5, 6, IGNORE, 8]]),
    labels=(0, 2, 0),
    lengths=(3, 3, 2),  # a piece may go on in the next row
    documents=None,
    step_targets=6,
    step_labels=frozenset({0, 2}),
)


def test_targets_count_for_the_label_of_their_piece():
    assert target_counts(BATCH, 4).tolist() == [4, 0, 2, 0]


def test_a_batch_of_one_label_alone_has_the_same_tokens_and_its_targets():
    batch = only(BATCH, 2)
    ignored = [IGNORE] * 4
    assert batch.targets.tolist() == [ignored, [5, 6, IGNORE, IGNORE]]
    assert batch.input_ids is BATCH.input_ids and batch.step_targets == 6
    assert only(BATCH, 1).targets.tolist() == [ignored, ignored]


@pytest.mark.parametrize("targets", [0, 6])
def test_a_step_without_targets_updates_nothing(targets):
    """As `data.token_filter` may leave one: it counts as a step, and its scale is a number."""
    calls, totals, config = [], StepTotals(3, torch.device("cpu")), load_config("debug", ["--masking.strategy=none"])
    batch = replace(BATCH, step_targets=targets, targets=BATCH.targets if targets else torch.full((2, 4), IGNORE))

    def engine(ids, targets, plan, scale, norms, balance):
        calls.append(scale)
        return torch.zeros(()), torch.zeros(3, dtype=torch.float64)

    engine.config, engine.device, engine.skipped, engine.finite = config, torch.device("cpu"), (), True
    engine.backward, engine.clip_factor = lambda loss: None, lambda: torch.tensor(1.0)
    engine.step = lambda live, lr, measure: calls.append(live)
    train_step(engine, [batch], config.tables, 1e-3, totals)
    scale, live = calls
    assert scale == 1 / max(1, targets) and bool(live) == bool(targets)
    assert totals.counts.tolist() == ([4, 0, 2] if targets else [0, 0, 0]) and not totals.skipped


def test_norms_of_keys_add_up_by_group_and_without_one_to_joint():
    keys = {"attn_out.es": 3.0, "mlp_out.es": 4.0, "mlp_in.retain": 2.0, "norm": 5.0, "head": 12.0}
    assert group_norms(keys, ("retain", "es", "fr")) == {"retain": 2.0, "es": 5.0, "fr": 0.0, "joint": 13.0}


def test_clipping_is_a_share_and_a_mean_since_it_was_taken():
    totals = StepTotals(1, torch.device("cpu"))
    assert all(map(math.isnan, totals.take_clipping()))
    for factor in (1.0, 0.5, 0.25, 1.0):
        totals.add_step(torch.tensor(factor))
    assert totals.take_clipping() == (0.5, 0.6875)
    assert all(map(math.isnan, totals.take_clipping()))


@pytest.mark.parametrize(("ranks", "expected"), [(2, [[1.0], [2.0]]), (3, [[3.0], [0.0], [0.0]])])
def test_sums_of_a_checkpoint_go_to_their_ranks_or_all_to_rank_0(ranks, expected):
    states = []
    for loss in (1.0, 2.0):
        saved = StepTotals(1, torch.device("cpu"))
        saved.add(torch.tensor([loss]), torch.tensor([5]))
        saved.end_step(True)
        states.append(saved.state())
    by_rank = [StepTotals(1, torch.device("cpu")) for _ in range(ranks)]
    for rank, totals in enumerate(by_rank):
        totals.restore(states, rank, ranks)
    assert [totals.sums.tolist() for totals in by_rank] == expected
    assert sum(int(totals.counts) for totals in by_rank) == 10
