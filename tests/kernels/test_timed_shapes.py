"""The masks under which ops are timed: those of the method, and as many forget tokens as their names have."""

from collections import Counter

import pytest

from sgtm_kernels.plan import PROJECTIONS
from sgtm_kernels.tools.shapes import FORGET, RETAIN, SGTM, SHAPES, UNLABELED, plans


def test_the_tables_are_those_of_sgtm_with_its_joint_parameters_masked():
    assert SGTM.active == ((1.0, 1.0), (1.0, 0.0), (1.0, 1.0)) and SGTM.labels[RETAIN] == "retain"
    assert all(SGTM.update[projection][FORGET] == (0.0, 1.0) for projection in PROJECTIONS)
    assert all(SGTM.update[p][label] == (1.0, 1.0) for p in PROJECTIONS for label in (UNLABELED, RETAIN))
    learn = {kind for kind, by_label in SGTM.update_joint.items() if by_label[FORGET] == 1}
    assert learn == {"final_norm", "head_bias"}


@pytest.mark.parametrize("name", SHAPES)
def test_a_mask_has_the_share_of_forget_tokens_that_it_is_named_for(name):
    shape = SHAPES[name]
    by_name = plans(shape)
    assert ("5 % forget" in by_name) == (shape.batch % 20 == 0) and "25 % forget" in by_name
    shares = {"unmasked": 0, "nothing masked": 0, "5 % forget": 5, "25 % forget": 25}
    shares |= {"25 % forget in every sequence": 25, "pure forget": 100, "pure retain": 0}
    for mask, plan in by_name.items():
        tokens = Counter()
        for run in plan.label_runs:
            tokens[run.label] += run.end - run.start
        assert plan.tokens == shape.tokens == sum(tokens.values())
        assert 100 * tokens[FORGET] == shares[mask] * plan.tokens
        assert set(tokens) <= {FORGET, RETAIN if mask == "pure retain" else UNLABELED}
    starts = {run.start for run in by_name["25 % forget in every sequence"].label_runs if run.label == FORGET}
    assert starts == set(range(0, shape.tokens, shape.seq_len))


@pytest.mark.parametrize("name", SHAPES)
def test_a_group_keeps_its_share_of_the_kv_heads(name):
    shape = SHAPES[name]
    layout = shape.layout
    assert layout.heads == (shape.heads - shape.forget_heads, shape.forget_heads)
    assert sum(layout.kv_heads) == shape.kv_heads
    assert {q // kv for q, kv in zip(layout.heads, layout.kv_heads, strict=True)} == {shape.heads // shape.kv_heads}
