"""sgtm/model/balance.py: a gradient besides the loss's own, of a weight that no packing changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import BIO, FAMILIES, MIXINGS, RETAIN, STRATEGIES, UNLABELED, gradients, model_of, plan_of, random_step
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from sgtm.data.batch import IGNORE
from sgtm.model import experts
from sgtm.model.balance import Balance
from sgtm.training.step import only
from sgtm_kernels.plan import MaskPlan

WEIGHT = 0.7
PER_TOKEN = FAMILIES["mixtral"].experts_per_token


@pytest.fixture
def routed(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits, in the graph, and choices of every layer that has run."""
    seen = []
    inner = experts.route

    def route(logits, *rest):
        weights, chosen = inner(logits, *rest)
        seen.append((logits, chosen))
        return weights, chosen

    monkeypatch.setattr(experts, "route", route)
    return seen


def by_hand(routed, labels: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The sum over layers and labels of n E sum_i f_i P_i, where all experts are active."""
    total = torch.zeros((), dtype=torch.float64)
    for logits, chosen in routed:
        for label in labels.unique():
            mine = (labels == label) & counted
            p, number = logits[mine].softmax(-1), logits.shape[-1]
            f = torch.bincount(chosen[mine].flatten(), minlength=number).double() / (PER_TOKEN * mine.sum())
            total = total + mine.sum() * number * (f * p.mean(0)).sum()
    return total


@pytest.mark.parametrize("mixing", MIXINGS)
def test_the_gradient_is_that_of_the_loss_by_hand(mixing, routed):
    """Of a model without masks: of every parameter, over the micro-batches of a step."""
    model, tables, batches = model_of("mixtral").double(), STRATEGIES["none"](), random_step(mixing, 1)
    ours = gradients(model, batches, tables, WEIGHT)
    model.zero_grad()
    for batch in batches:
        routed.clear()
        loss, _ = model(batch.input_ids, batch.targets, plan_of(batch, tables), 1 / batch.step_targets)
        labels = torch.repeat_interleave(torch.tensor(batch.labels), torch.tensor(batch.lengths))
        extra = by_hand(routed, labels.view_as(batch.targets), batch.targets != IGNORE)
        (loss + WEIGHT / batch.step_targets * extra).backward()
    plain = gradients(model_of("mixtral").double(), batches, tables)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-6, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        if "router" in name:
            assert (ours[name] - plain[name]).abs().max() > 1e-3


def test_a_layer_of_one_label_has_the_loss_of_transformers():
    """`load_balancing_loss_func`, which counts a token once for every choice: k times as much."""
    tables, generator = STRATEGIES["none"](), torch.Generator().manual_seed(0)
    logits = torch.randn(3, 12, 8, generator=generator, dtype=torch.float64).requires_grad_()
    plan = MaskPlan.uniform(tables, RETAIN, 3, 12)
    _, chosen = experts.route(logits, PER_TOKEN, plan, (0, 3, 6, 8))
    balance, zero = Balance(torch.zeros(3, 12, dtype=torch.int64)), torch.zeros((), dtype=torch.float64)
    balance.add(logits, chosen, plan, (0, 3, 6, 8), "torch")
    balance.added(zero, 1 / 36).backward()
    ours, logits.grad = logits.grad, None
    (load_balancing_loss_func((logits.flatten(0, 1),), 8, PER_TOKEN) / PER_TOKEN).backward()
    torch.testing.assert_close(ours, logits.grad, rtol=1e-6, atol=1e-8)  # its shares are in fp32


@pytest.mark.parametrize("mixing", MIXINGS)
def test_the_loss_has_the_same_value(mixing):
    model, tables = model_of("mixtral"), STRATEGIES["sgtm"]()
    for batch in random_step(mixing):
        inputs = (batch.input_ids, batch.targets, plan_of(batch, tables), 1 / batch.step_targets)
        for plain, with_it in zip(model(*inputs), model(*inputs, balance=WEIGHT), strict=True):
            assert torch.equal(plain, with_it)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_step_twice_as_long_has_the_same_gradient(mixing):
    """To the bit: each micro-batch twice, of twice as many targets. The weight depends on no accumulation."""
    model, tables, batches = model_of("mixtral").double(), STRATEGIES["sgtm"](), random_step(mixing, 1)
    once = gradients(model, batches, tables, WEIGHT)
    longer = [replace(batch, step_targets=2 * batch.step_targets) for batch in batches]
    twice = {name: torch.zeros_like(value) for name, value in once.items()}
    for _ in range(2):
        for name, value in gradients(model, longer, tables, WEIGHT).items():
            twice[name] += value
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize("mixing", ["sequence", "token"])
def test_the_gradients_of_the_labels_add_up(mixing):
    """As `probe` takes them: without its targets a label has no part in the loss."""
    model, tables, batches = model_of("mixtral").double(), STRATEGIES["sgtm"](), random_step(mixing, 1)
    whole = gradients(model, batches, tables, WEIGHT)
    parts = [gradients(model, [only(batch, label) for batch in batches], tables, WEIGHT) for label in range(4)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_activation_checkpointing_changes_no_bit(mixing):
    tables, batches = STRATEGIES["sgtm"](), random_step(mixing)
    models = [model_of("mixtral", activation_checkpointing=on) for on in (False, True)]
    plain, again = (gradients(model, batches, tables, WEIGHT) for model in models)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert not torch.equal(plain["blocks.0.mlp.router"], gradients(models[0], batches, tables)["blocks.0.mlp.router"])


@pytest.mark.parametrize("strategy", ["sgtm", "sgtm+strict", "gram"])
def test_forget_tokens_balance_through_their_domains_rows_alone(strategy):
    """The domain's experts get a larger or a smaller share; retain's rows of the router learn nothing from it."""
    model, tables, batches = model_of("mixtral"), STRATEGIES[strategy](), random_step("step", 1, BIO)
    plain, balanced = (gradients(model, batches, tables, weight) for weight in (0.0, WEIGHT))
    for layer in range(2):
        before, after = (each[f"blocks.{layer}.mlp.router"] for each in (plain, balanced))
        assert bool((after[:3] == 0).all()) and bool((after[6:] == 0).all())
        assert bool((after[3:6] != before[3:6]).all())


def test_descent_on_it_alone_spreads_the_choices():
    """Retain's over its experts; a domain's own experts, which its tokens do not choose at first, get an even share."""
    generator, bounds = torch.Generator().manual_seed(0), (0, 4, 6, 8)
    x = 0.5 + torch.randn(1, 400, 32, generator=generator)
    start = 0.1 * torch.randn(8, 32, generator=generator) + torch.linspace(0.15, -0.15, 8)[:, None]
    for label, active, own in ((RETAIN, range(4), range(4)), (BIO, range(6), range(4, 6))):
        router, plan = start.clone().requires_grad_(), MaskPlan.uniform(STRATEGIES["sgtm"](), label, 1, 400)

        def shares(router=router, plan=plan) -> tuple:
            logits = x @ router.t()
            chosen = experts.route(logits, PER_TOKEN, plan, bounds)[1]
            return logits, chosen, (torch.bincount(chosen.flatten(), minlength=8) / chosen.numel()).tolist()

        before = shares()[2]
        assert min(before[expert] for expert in own) < 0.05
        for _ in range(200):
            logits, chosen, _ = shares()
            balance = Balance(torch.zeros(1, 400, dtype=torch.int64))
            balance.add(logits, chosen, plan, bounds, "torch")
            (gradient,) = torch.autograd.grad(balance.added(torch.zeros(()), 1 / 400), router)
            with torch.no_grad():
                router[own.start : own.stop] -= 0.3 * gradient[own.start : own.stop]  # as the masks have it
        after = shares()[2]
        assert min(after[expert] for expert in own) > 0.8 / len(active), (label, before, after)


def test_a_loss_that_is_not_finite_makes_the_loss_so():
    """Else the step would not be skipped."""
    loss, logits = torch.ones(()), torch.full((1, 2, 8), torch.nan)
    plan, balance = MaskPlan.uniform(STRATEGIES["none"](), UNLABELED, 1, 2), Balance(torch.zeros(1, 2).long())
    balance.add(logits, torch.zeros(1, 2, 2).long(), plan, (0, 3, 6, 8), "torch")
    assert balance.added(loss, 1.0).isnan()
