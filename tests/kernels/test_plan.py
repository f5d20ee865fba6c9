"""MaskPlan and Tables against per-token arithmetic."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgtm_kernels.plan import JOINT_KINDS, PROJECTIONS, LabelRun, MaskPlan, Slice, Tables, merge_label_runs
from sgtm_kernels.testing import BINARY, FLOATS, LAYOUTS, random_plan, random_tables

BOUNDS = (0, 5, 6, 9)

plans = st.builds(
    lambda seed, values, layout, batch, seq_len: random_plan(seed, random_tables(seed, values), layout, batch, seq_len),
    st.integers(0, 10**6),
    st.sampled_from([BINARY, FLOATS]),
    st.sampled_from(LAYOUTS),
    st.integers(1, 12),
    st.integers(1, 9),
)


def labels_of(plan: MaskPlan) -> list[int]:
    return [run.label for run in plan.label_runs for _ in range(run.start, run.end)]


def spread(slices, tokens: int) -> list[float]:
    """Weight of every token, from slices; a token in two of them is counted twice."""
    weights = [0.0] * tokens
    for start, end, weight in slices:
        for t in range(start, end):
            weights[t] += weight
    return weights


@given(plans, st.tuples(*[st.sampled_from(FLOATS)] * 4))
@settings(max_examples=100, deadline=None)
def test_updaters_are_the_tokens_with_a_weight(plan, by_label):
    tokens = plan.updaters(by_label)
    want = [by_label[label] for label in labels_of(plan)]
    assert spread(tokens.slices, plan.tokens) == want
    assert all(start < end and weight != 0 for start, end, weight in tokens.slices)
    for left, right in pairwise(tokens.slices):
        assert left.end < right.start or left.weight != right.weight, "neighbours of one weight are one slice"
    assert plan.plain(tokens) == (want == [1.0] * plan.tokens)
    for dtype in (torch.float32, torch.bfloat16):
        weights = plan.token_weights(by_label, torch.empty(0, dtype=dtype))
        assert weights.dtype == dtype and weights.tolist() == want


@given(plans, st.sampled_from(PROJECTIONS))
@settings(max_examples=100, deadline=None)
def test_rows_give_every_group_its_tokens(plan, projection):
    tables, work = plan.tables, plan.rows(projection, BOUNDS)
    assert [w.start for w in work] == [0, *(w.end for w in work[:-1])] and work[-1].end == BOUNDS[-1]
    for group, (start, end) in enumerate(pairwise(BOUNDS)):
        want = []
        for label in labels_of(plan):
            arrives = tables.active[label][group] != 0 and (projection[-2:] != "in" or tables.route[label][group] != 0)
            want.append(tables.update[projection][label][group] if arrives else 0.0)
        for row in range(start, end):
            (mine,) = [w for w in work if w.start <= row < w.end]
            assert spread(mine.tokens.slices, plan.tokens) == want
            if any(want):
                weights = plan.token_weights(mine.tokens.by_label, torch.empty(0))
                assert weights.tolist() == want, "the label vector and the slices must say the same"


def test_nothing_masked_is_one_piece_of_work():
    tables = random_tables(0, (1.0,))
    plan = random_plan(0, tables, "tokens", 4, 20)
    for projection in PROJECTIONS:
        (work,) = plan.rows(projection, BOUNDS)
        assert (work.start, work.end) == (0, BOUNDS[-1]) and plan.plain(work.tokens)
    assert all(plan.plain(plan.joint(kind)) for kind in JOINT_KINDS)


def test_sorted_sgtm_batch_is_two_pieces_of_work():
    """The case the design is built for: retain rows learn from the last tokens, forget rows from the first."""
    ones, update = ((1.0, 1.0),) * 3, ((1.0, 1.0), (1.0, 1.0), (0.0, 1.0))
    active = ((1.0, 1.0), (1.0, 0.0), (1.0, 1.0))
    tables = Tables(
        ("unlabeled", "retain", "forget:a"),
        ("retain", "a"),
        active,
        ones,
        dict.fromkeys(PROJECTIONS, update),
        dict.fromkeys(JOINT_KINDS, (1.0,) * 3),
    )
    plan = MaskPlan(tables, merge_label_runs([2, 2, 0, 1], [10] * 4), 4, 10)
    retain, forget = plan.rows("mlp_in", (0, 6, 8))
    assert (retain.start, retain.end, retain.tokens.slices) == (0, 6, (Slice(20, 40, 1.0),))
    assert (forget.start, forget.end, forget.tokens.slices) == (6, 8, (Slice(0, 30, 1.0),))


def test_merge_label_runs():
    assert merge_label_runs([1, 1, 0, 2, 0], [3, 4, 5, 0, 2]) == (LabelRun(1, 0, 7), LabelRun(0, 7, 14))
    assert merge_label_runs([0, 2, 1], [0, 1, 1]) == (LabelRun(2, 0, 1), LabelRun(1, 1, 2))
    with pytest.raises(ValueError):
        merge_label_runs([0, 1], [3])


@pytest.mark.parametrize(("cuts", "whole"), [([8, 4], True), ([12], True), ([7, 5], False), ([4, 6, 2], False)])
def test_whole_sequences(cuts, whole):
    plan = MaskPlan(random_tables(0), merge_label_runs([0, 1, 2][: len(cuts)], cuts), 3, 4)
    assert plan.whole_sequences == whole


def test_uniform_plan():
    plan = MaskPlan.uniform(random_tables(0), 2, 3, 5)
    assert plan.label_runs == (LabelRun(2, 0, 15),) and plan.tokens == 15


@pytest.mark.parametrize(
    "runs",
    [
        (),
        (LabelRun(0, 0, 5),),
        (LabelRun(0, 0, 3), LabelRun(1, 4, 6)),
        (LabelRun(0, 1, 6),),
        (LabelRun(0, 0, 4), LabelRun(1, 3, 6)),
    ],
)
def test_runs_must_cover_the_micro_batch(runs):
    with pytest.raises(ValueError, match="must cover the 6 tokens"):
        MaskPlan(random_tables(0), runs, 2, 3)


@given(plans, st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_spans_are_the_documents_of_the_tokens(plan, seed):
    cut = random_plan(seed, plan.tables, "tokens", plan.batch, plan.seq_len, documents=True)
    for one in (plan, cut):
        whole = [(b * plan.seq_len, (b + 1) * plan.seq_len) for b in range(plan.batch)]
        want = [
            [start - start // plan.seq_len * plan.seq_len, end - start // plan.seq_len * plan.seq_len]
            for start, end in one.documents or whole
            for _ in range(start, end)
        ]
        spans = one.spans(torch.device("cpu"))
        assert spans.dtype == torch.int32 and spans.t().tolist() == want


@given(plans, st.lists(st.tuples(*[st.sampled_from(FLOATS)] * 4), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_live_names_the_nearest_tokens_with_a_factor(plan, by_group):
    others = [tuple(float(factor == 0) for factor in by_label) for by_label in by_group]
    for factors in (by_group, others):  # of one plan
        following, previous = plan.live(factors, torch.device("cpu")).tolist()
        for by_label, after, before in zip(factors, following, previous, strict=True):
            live = [token for token, label in enumerate(labels_of(plan)) if by_label[label] != 0]
            for token in range(plan.tokens):
                assert after[token] == min((t for t in live if t >= token), default=plan.tokens)
                assert before[token] == max((t + 1 for t in live if t <= token), default=0)


def test_unknown_label():
    with pytest.raises(ValueError, match="outside"):
        MaskPlan.uniform(random_tables(0, labels=4), 4, 1, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"active": ((1.0,),)},
        {"route": ((1.0, 1.0), (1.0,))},
        {"update": {"attn_in": ((1.0, 1.0),) * 2}},
        {"update_joint": dict.fromkeys(JOINT_KINDS[1:], (1.0, 1.0))},
        {"update_joint": dict.fromkeys(JOINT_KINDS, (1.0,))},
    ],
)
def test_tables_of_a_wrong_shape(change):
    ones = ((1.0, 1.0), (1.0, 1.0))
    fine = {
        "labels": ("a", "b"),
        "groups": ("retain", "x"),
        "active": ones,
        "route": ones,
        "update": dict.fromkeys(PROJECTIONS, ones),
        "update_joint": dict.fromkeys(JOINT_KINDS, (1.0, 1.0)),
    }
    Tables(**fine)
    with pytest.raises(ValueError):
        Tables(**fine | change)
