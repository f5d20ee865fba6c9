"""Labels, lengths and documents of a timed step; tests/processes/test_benchmark_steps.py has all of them together."""

from dataclasses import replace

import pytest
import torch

from sgtm.measure.cases import (
    MICRO_BLOCKS,
    Case,
    Mean,
    by_document,
    by_micro_batch,
    by_sequence,
    cases,
    dealt,
    random_batches,
)
from sgtm.measure.models import SETTINGS

TWENTY = SETTINGS["tiny"]()  # of 64 tokens
FOUR = replace(TWENTY, micro_batch=2, accumulation=2)
CPU = torch.device("cpu")


def test_sequences_are_dealt_out_as_cards_are():
    hands = dealt([2, 2, 2, 0, 0, 0], 2, 64)
    assert [hand.labels for hand in hands] == [(2, 2, 0), (2, 0, 0)]
    assert [hand.lengths for hand in hands] == [(64, 64, 64)] * 2 and hands[0].documents is None


def test_a_share_of_whole_sequences_is_rounded_down():
    (step,) = by_sequence(TWENTY, 5)
    assert step.labels == (2, *[0] * 19)
    assert [pieces.labels for pieces in by_sequence(FOUR, 25)] == [(2, 0), (0, 0)]
    assert [pieces.labels for pieces in by_sequence(FOUR, 5)] == [(0, 0), (0, 0)]


def test_micro_batches_are_of_one_label_each():
    step = by_micro_batch(FOUR, 25)
    assert [pieces.labels for pieces in step] == [(2, 2), (0, 0), (0, 0), (0, 0)] and len(step) == MICRO_BLOCKS
    assert {pieces.lengths for pieces in step} == {(64, 64)}


def test_sequences_have_the_same_documents_in_another_order_each():
    first, second = by_document(FOUR, 25)
    assert first == second
    assert first.lengths == (3, 13, 16, 16, 16, 13, 16, 16, 16, 3)  # 5, 20 and 25 % of 64
    assert first.labels == (2, 2, 0, 0, 0, 2, 0, 0, 0, 2)
    assert first.documents[:3] == ((0, 3), (3, 16), (16, 32)) and first.documents[-1] == (125, 128)
    assert by_document(FOUR, 5)[0].labels == (2, 0, 0, 0, 0, 0, 0, 0, 0, 2)


def test_a_share_finer_than_a_step_is_a_mean_of_two_steps():
    fine, coarse = cases(TWENTY), cases(FOUR)
    assert isinstance(fine["5 %, sequence"], Case) and isinstance(coarse["5 %, sequence"], Mean)
    assert coarse["5 %, sequence"].weights == {"nothing masked": 0.8, "25 %, sequence": 0.2}
    assert fine["5 %, step"].weights == pytest.approx({"nothing masked": 0.95, "pure forget": 0.05})
    assert fine["25 %, token"].of == "none, token" and fine["25 %, step"].of == "none"


def test_tokens_follow_from_the_sizes_alone():
    masked, plain = (random_batches(by_sequence(FOUR, percent), FOUR.model, CPU) for percent in (25, 0))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(masked, plain, strict=True))
    assert not torch.equal(masked[0].input_ids, masked[1].input_ids)
    assert {batch.step_targets for batch in masked} == {4 * 64}
    assert (masked[1].step_labels, plain[0].step_labels) == (frozenset({0, 2}), frozenset({0}))
    (batch, _) = random_batches(by_sequence(FOUR, 0), FOUR.model, CPU, step_targets=1000)
    assert batch.step_targets == 1000 and batch.input_ids.shape == (2, 64)
