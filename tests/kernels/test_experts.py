"""A mixture of experts: the router's choice among active groups, and experts that no other label's tokens touch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from sgtm_kernels.experts import balance, choices, experts, route
from sgtm_kernels.plan import LabelRun, MaskPlan, Tables
from sgtm_kernels.testing import (
    BINARY,
    EXACT,
    FLOATS,
    LAYOUTS,
    assert_accurate,
    assert_same_bits,
    forward_backward,
    random_like,
    random_plan,
    random_tables,
    token_mask,
)

BOUNDS = (0, 4, 7, 9)
"""Of the experts; the first group also has the shared ones."""
NUMBER, SIZE, WIDTH, PER_TOKEN = BOUNDS[-1], 6, 10, 3

by_layout = pytest.mark.parametrize("layout", LAYOUTS)
by_shared = pytest.mark.parametrize("shared", [0, 2])
by_backend = pytest.mark.parametrize("backend", EXACT)


def data(plan: MaskPlan, shared: int, dtype=torch.float64, size: int = SIZE, width: int = WIDTH) -> list[torch.Tensor]:
    """x, logits, w_in, w_out"""
    shapes = (
        (plan.batch, plan.seq_len, width),
        (plan.batch, plan.seq_len, NUMBER),
        (2 * size * (shared + NUMBER), width),
        (size * (shared + NUMBER), width),
    )
    return [random_like(torch.empty(shape, dtype=torch.float64), seed).to(dtype) for seed, shape in enumerate(shapes)]


def layer(plan: MaskPlan, shared: int, backend: str = "torch", bounds=BOUNDS, per_token: int = PER_TOKEN):
    def run(x, logits, w_in, w_out):
        weights, chosen = route(logits, per_token, plan, bounds, backend)
        return experts(x, weights, chosen, w_in, w_out, plan, bounds, shared, backend)

    return run


def rows_of(group: int, shared: int) -> slice:
    """Of a group in w_out."""
    start, end = BOUNDS[group], BOUNDS[group + 1]
    return slice((shared + start if group else 0) * SIZE, (shared + end) * SIZE)


@by_layout
@by_shared
@pytest.mark.parametrize("values", [FLOATS, BINARY, (1.0,)])
def test_torch_is_the_reference_in_fp64(values, shared, layout):
    plan = random_plan(1, random_tables(2, values), layout, 9, 7)
    for bounds in (BOUNDS, (0, NUMBER)):
        ours, theirs = (
            forward_backward(layer(plan, shared, backend, bounds), *data(plan, shared))
            for backend in ("torch", "reference")
        )
        for name, mine, wanted in zip(("y", "dx", "dlogits", "dw_in", "dw_out"), ours, theirs, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@by_backend
@by_layout
@by_shared
def test_groups_that_no_token_updates_have_a_gradient_of_0(shared, layout, backend):
    plan = random_plan(3, random_tables(4, BINARY), layout, 9, 7)
    *_, dw_in, dw_out = forward_backward(layer(plan, shared, backend), *data(plan, shared))
    contributes = plan.tables.contributions
    for group in range(3):
        rows = rows_of(group, shared)
        for projection, gradient, fold in (("mlp_in", dw_in, 2), ("mlp_out", dw_out, 1)):
            if not any(contributes[projection][group][label] for label in plan.present):
                assert bool((gradient[fold * rows.start : fold * rows.stop] == 0).all()), (group, projection)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "uniform"])
@by_shared
def test_tokens_of_other_labels_change_no_bit(shared, layout, dtype):
    """Nor how many of them are at an expert: of a size at which the rounding of products depends on their rows."""
    size = width = 48
    tables = random_tables(5, BINARY)
    plan = random_plan(6, tables, layout, 12, 40)
    inputs, others = data(plan, shared, dtype, size, width), data(plan, shared, dtype, size, width)
    for label in plan.present:
        mine = token_mask(plan, [label])
        for n in (0, 1):
            others[n] = torch.where(mine[..., None], random_like(inputs[n], 9), inputs[n])
        moved = [route(values[1], PER_TOKEN, plan, BOUNDS)[1] for values in (inputs, others)]
        assert not torch.equal(*moved) or not any(tables.active[label])
        before, after = (forward_backward(layer(plan, shared), *values) for values in (inputs, others))
        for name, old, new in zip(("y", "dx", "dlogits"), before, after, strict=False):
            assert_same_bits(new[~mine], old[~mine], f"{name} of other labels than {label}")
        for group in range(3):
            start, end = ((shared * bool(bound) + bound) * size for bound in BOUNDS[group : group + 2])
            for projection, fold, n in (("mlp_in", 2, 3), ("mlp_out", 1, 4)):
                if not tables.contribution(projection, label, group):
                    rows = slice(fold * start, fold * end)
                    assert_same_bits(after[n][rows], before[n][rows], f"{projection} of group {group}, label {label}")


def test_a_product_has_the_rows_of_one_label():
    """A token alone at an expert is a product of one row, which a CPU rounds otherwise than one of several."""
    tables = random_tables(0, (1.0,), labels=2)
    plan = MaskPlan(tables, (LabelRun(0, 0, 4), LabelRun(1, 4, 16)), 1, 16)
    mine, joined = token_mask(plan, [0])[..., None], 0
    for seed in range(20):
        inputs = data(plan, 0, torch.float32, 48, 48)
        others = [torch.where(mine, tensor, random_like(tensor, 100 + seed)) for tensor in inputs[:2]] + inputs[2:]
        before, after = (forward_backward(layer(plan, 0), *values) for values in (inputs, others))
        for name, old, new in zip(("y", "dx", "dlogits"), before, after, strict=False):
            assert_same_bits(new[mine[..., 0]], old[mine[..., 0]], name)
        choices = [route(values[1], PER_TOKEN, plan, BOUNDS)[1].flatten(0, 1) for values in (inputs, others)]
        joined += not torch.equal(choices[0][4:], choices[1][4:])
    assert joined == 20


@by_shared
@by_layout
def test_dx_is_that_of_weights_that_all_tokens_update(layout, shared):
    tables = random_tables(7, BINARY)
    ones = tuple((1.0,) * 3 for _ in tables.labels)
    free = Tables(
        tables.labels,
        tables.groups,
        tables.active,
        tables.route,
        dict.fromkeys(tables.update, ones),
        tables.update_joint,
    )
    plans = [random_plan(8, each, layout, 9, 7) for each in (tables, free)]
    masked, plain = (forward_backward(layer(plan, shared), *data(plan, shared)) for plan in plans)
    for mine, wanted in zip(masked[:3], plain[:3], strict=True):
        assert_same_bits(mine, wanted)


def active_only(*groups: int) -> MaskPlan:
    """One label of which these groups are active, and 20 tokens of it."""
    tables = random_tables(0, (1.0,), labels=1)
    active = (tuple(float(group in groups) for group in range(3)),)
    tables = Tables(tables.labels, tables.groups, active, tables.route, tables.update, tables.update_joint)
    return MaskPlan(tables, (LabelRun(0, 0, 20),), 2, 10)


@by_backend
@pytest.mark.parametrize(("groups", "reached"), [((0, 1, 2), 3), ((0,), 3), ((2,), 2), ((), 0)])
def test_a_token_chooses_among_active_experts_or_takes_all_of_fewer(groups, reached, backend):
    plan = active_only(*groups)
    logits = data(plan, 0)[1]
    weights, chosen = route(logits, PER_TOKEN, plan, BOUNDS, backend)
    allowed = [expert for group in groups for expert in range(*BOUNDS[group : group + 2])]
    assert set(chosen.flatten().tolist()) <= {*allowed, NUMBER} and (NUMBER in chosen) == (reached < PER_TOKEN)
    assert bool((weights[..., reached:] == 0).all()) and bool((chosen[..., reached:] == NUMBER).all())
    torch.testing.assert_close(weights.sum(-1), torch.full((2, 10), float(reached > 0), dtype=torch.float64))
    if reached:
        best = logits[..., allowed].topk(min(PER_TOKEN, len(allowed)), dim=-1)
        torch.testing.assert_close(weights[..., :reached], best.values[..., :reached].softmax(-1))
        assert torch.equal(chosen[..., :reached], torch.tensor(allowed)[best.indices[..., :reached]])
    results = forward_backward(layer(plan, 2 if 0 in groups else 0, backend), *data(plan, 2 if 0 in groups else 0))
    assert all(bool(result.isfinite().all()) for result in results)
    if not reached:
        assert all(bool((result == 0).all()) for result in results)


def test_an_expert_without_tokens_has_a_gradient_of_0_of_full_shape():
    plan = active_only(0, 1, 2)
    x, logits, w_in, w_out = data(plan, 0)
    logits[..., 5] = -100.0
    *_, dw_in, dw_out = forward_backward(layer(plan, 0), x, logits, w_in, w_out)
    assert dw_in.shape == w_in.shape and dw_out.shape == w_out.shape
    for fold, gradient in ((2, dw_in), (1, dw_out)):
        none = (gradient.unflatten(0, (NUMBER, fold * SIZE)) == 0).flatten(1).all(1)
        assert none.tolist() == [expert == 5 for expert in range(NUMBER)]


@by_shared
@by_layout
def test_experts_are_as_accurate_as_torch(layout, shared):
    """In bf16, of one choice: two experts of nearly equal logits would change places."""
    plan = random_plan(3, random_tables(4), layout, 10, 20)
    weights, chosen = route(data(plan, shared)[1], PER_TOKEN, plan, BOUNDS)

    def run(backend: str, dtype: torch.dtype):
        x, _, w_in, w_out = data(plan, shared, torch.bfloat16)
        cast = [tensor.to(dtype) for tensor in (x, weights.bfloat16(), w_in, w_out)]
        return forward_backward(lambda x, p, a, b: experts(x, p, chosen, a, b, plan, BOUNDS, shared, backend), *cast)

    exact, theirs, ours = (
        run("reference", torch.float64),
        run("reference", torch.bfloat16),
        run("torch", torch.bfloat16),
    )
    for name, *values in zip(("y", "dx", "dweights", "dw_in", "dw_out"), ours, theirs, exact, strict=True):
        assert_accurate(*values, name=name)


def test_the_same_bits_again_and_from_a_strided_input():
    plan = random_plan(3, random_tables(4), "tokens", 10, 20)
    inputs = data(plan, 2, torch.float32)
    first, again = (forward_backward(layer(plan, 2), *inputs) for _ in range(2))
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs[:2]]
    for one in (again, forward_backward(layer(plan, 2), *strided, *inputs[2:])):
        for mine, wanted in zip(one, first, strict=True):
            assert_same_bits(mine, wanted)


def balanced(plan: MaskPlan, counted: torch.Tensor, backend: str = "torch", bounds=BOUNDS, per_token: int = PER_TOKEN):
    def run(logits):
        _, chosen = route(logits, per_token, plan, bounds, backend)
        return balance(logits, chosen, counted, plan, bounds, backend)

    return run


def most(plan: MaskPlan) -> torch.Tensor:
    """bool [B, S]: four of five tokens count."""
    return torch.rand(plan.batch, plan.seq_len, generator=torch.Generator().manual_seed(3)) < 0.8


@by_layout
@pytest.mark.parametrize("values", [FLOATS, BINARY, (1.0,)])
def test_the_balance_of_torch_is_that_of_the_reference_in_fp64(values, layout):
    plan = random_plan(1, random_tables(2, values), layout, 9, 7)
    for bounds in (BOUNDS, (0, NUMBER)):
        logits, counted = data(plan, 0)[1], most(plan)
        _, chosen = route(logits, PER_TOKEN, plan, bounds)
        assert torch.equal(*(choices(chosen, counted, plan, bounds, backend) for backend in ("torch", "reference")))
        ours, theirs = (
            forward_backward(balanced(plan, counted, backend, bounds), logits) for backend in ("torch", "reference")
        )
        for mine, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)


@by_backend
def test_the_balance_by_hand(backend):
    """Four tokens; two domains of two experts each, of which one is inactive; one choice. Token 3 does not count."""
    tables = random_tables(0, (1.0,), labels=1)
    tables = Tables(tables.labels, tables.groups, ((1.0, 0.0, 1.0),), tables.route, tables.update, tables.update_joint)
    plan, bounds = MaskPlan(tables, (LabelRun(0, 0, 4),), 1, 4), (0, 2, 4, 6)
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.5, 0.1, 0.2, 0.2], [0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
    logits = torch.cat((p[:, :2].log(), torch.full((4, 2), 9.0), p[:, 2:].log()), dim=1)[None].double()
    counted = torch.tensor([[True, True, True, False]])
    value, gradient = forward_backward(balanced(plan, counted, backend, bounds, 1), logits)
    f, mean = (2 / 3, 0.0, 0.0, 1 / 3), p[:3].double().mean(0).tolist()
    assert float(value) == pytest.approx(3 * 4 * sum(a * b for a, b in zip(f, mean, strict=True)), rel=1e-6)
    token = [4 * q * (a - (0.4 * 2 / 3 + 0.1 / 3)) for q, a in zip((0.4, 0.3, 0.2, 0.1), f, strict=True)]
    scale = float(gradient[0, 0, 0]) / token[0]  # of the gradient that arrives
    assert gradient[0, 0, [0, 1, 4, 5]].tolist() == pytest.approx([scale * value for value in token], rel=1e-5)
    assert bool((gradient[0, :, 2:4] == 0).all()) and bool((gradient[0, 3] == 0).all())


@by_backend
@pytest.mark.parametrize(("chosen", "pushed"), [([0, 1, 2, 3], True), ([0, 1, 5, 5], False), ([5, 5, 5, 5], False)])
def test_experts_that_a_label_may_update_are_pushed_up_to_an_even_share(chosen, pushed, backend):
    """Expert 5 alone, of six: where it has a sixth of the choices or more the others have no pull."""
    tables = random_tables(0, (1.0,), labels=1)
    update = tables.update | {"mlp_in": ((0.0, 0.0, 1.0),)}
    tables = Tables(tables.labels, tables.groups, tables.active, tables.route, update, tables.update_joint)
    plan, bounds = MaskPlan(tables, (LabelRun(0, 0, 4),), 1, 4), (0, 2, 5, 6)
    logits, counted = random_like(torch.empty(1, 4, 6), 1).double().requires_grad_(), torch.ones(1, 4) > 0
    value = balance(logits, torch.tensor(chosen)[None, :, None], counted, plan, bounds, backend)
    value.backward()
    value = value.detach()
    if pushed:
        assert bool((logits.grad[..., 5] < 0).all()) and bool((logits.grad[..., :5] > 0).all())
        p = logits.detach().softmax(-1).mean((0, 1))
        assert float(value) == pytest.approx(4 * 6 * float(p[:5].sum()) / 6)
    else:
        assert logits.grad.abs().max() < 1e-12 and float(value) == pytest.approx(4 * 6 * chosen.count(5) / 4)


@by_backend
def test_a_label_that_may_update_no_expert_has_no_balance(backend):
    tables = random_tables(0, (1.0,), labels=1)
    update = tables.update | {"mlp_in": ((0.0, 0.0, 0.0),)}
    tables = Tables(tables.labels, tables.groups, tables.active, tables.route, update, tables.update_joint)
    plan = MaskPlan(tables, (LabelRun(0, 0, 20),), 2, 10)
    value, gradient = forward_backward(balanced(plan, torch.ones(2, 10) > 0, backend), data(plan, 0)[1])
    assert float(value) == 0 and bool((gradient == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "uniform"])
def test_the_balance_of_a_label_has_no_bit_of_another(layout, dtype):
    """Not even where the logits of the other are not finite."""
    for values in (BINARY, (1.0,)):
        plan = random_plan(6, random_tables(5, values), layout, 12, 40)
        logits, counted = data(plan, 0, dtype)[1], most(plan)
        before = forward_backward(balanced(plan, counted), logits)[1]
        for label in plan.present:
            mine = token_mask(plan, [label])
            for other in (random_like(logits, 9), torch.full_like(logits, torch.nan)):
                after = forward_backward(balanced(plan, counted), torch.where(mine[..., None], other, logits))[1]
                assert_same_bits(after[~mine], before[~mine], f"of other labels than {label}")


@by_backend
@pytest.mark.parametrize(("groups", "number"), [((0, 1, 2), 9), ((0,), 4), ((1,), 3), ((2,), 2), ((), 0)])
def test_experts_that_are_all_chosen_need_no_balance(groups, number, backend):
    """Nor do those that a token does not reach."""
    plan = active_only(*groups)
    value, gradient = forward_backward(balanced(plan, torch.ones(2, 10) > 0, backend), data(plan, 0)[1])
    reached = [expert for group in groups for expert in range(*BOUNDS[group : group + 2])]
    assert (number > PER_TOKEN) == bool(value != 0)
    moved = (gradient != 0).flatten(0, 1).all(0).nonzero().flatten().tolist()
    assert moved == (reached if number > PER_TOKEN else []) and bool(gradient.isfinite().all())
    assert int((gradient != 0).sum()) == 20 * len(moved)


@by_layout
def test_the_balance_is_as_accurate_as_torch(layout):
    plan = random_plan(3, random_tables(4), layout, 10, 20)
    logits, counted = data(plan, 0, torch.bfloat16)[1], most(plan)
    chosen = route(logits, PER_TOKEN, plan, BOUNDS)[1]

    def run(backend: str, dtype: torch.dtype):
        return forward_backward(lambda z: balance(z, chosen, counted, plan, BOUNDS, backend), logits.to(dtype))

    exact, theirs, ours = (
        run("reference", torch.float64),
        run("reference", torch.bfloat16),
        run("torch", torch.bfloat16),
    )
    for name, *values in zip(("loss", "dlogits"), ours, theirs, exact, strict=True):
        assert_accurate(*values, name=name)


def test_wrong_arguments_are_refused():
    plan = active_only(0)
    x, logits, w_in, w_out = data(plan, 1)
    weights, chosen = route(logits, PER_TOKEN, plan, BOUNDS)
    with pytest.raises(ValueError, match="10 of 9 experts cannot be chosen for a token; take 1 to 9"):
        route(logits, 10, plan, BOUNDS)
    with pytest.raises(ValueError, match="must cut 9 into 1 group or the plan's 3"):
        route(logits, 2, plan, (0, 9, 9))
    with pytest.raises(ValueError, match="the tensor of shape"):
        balance(logits, chosen, torch.ones(2, 9) > 0, plan, BOUNDS)
    with pytest.raises(ValueError, match="must cut 9 into 1 group or the plan's 3"):
        balance(logits, chosen, torch.ones(2, 10) > 0, plan, (0, 9, 9))
    with pytest.raises(ValueError, match="2 shared and 9 other experts do not divide w_out of 60 rows"):
        experts(x, weights, chosen, w_in, w_out, plan, BOUNDS, 2)
    with pytest.raises(ValueError, match="w_in of 60, which must be twice as many"):
        experts(x, weights, chosen, w_out, w_out, plan, BOUNDS, 1)
    with pytest.raises(ValueError, match="the tensor of shape"):
        experts(x[:1, :5], weights, chosen, w_in, w_out, plan, BOUNDS, 1)


def test_bounds_of_the_rows_follow_from_those_of_the_experts():
    assert [rows_of(group, 2) for group in range(3)] == [slice(0, 36), slice(36, 54), slice(54, 66)]
    assert sum(end - start for start, end in pairwise(BOUNDS)) == NUMBER
