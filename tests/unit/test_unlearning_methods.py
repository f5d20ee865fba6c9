"""Each loss of unlearning against its formula, written out with the probabilities of single tokens."""

from __future__ import annotations

import math

import pytest
import torch
from texts import CONFIG, FORGOTTEN, RETAINED, token_losses
from tiny import tiny_model

from sgtm.model.transformer import Transformer
from sgtm.unlearning.methods import METHODS, finetune, grad_diff, gradient_ascent, npo, simnpo


@pytest.fixture
def model() -> Transformer:
    return tiny_model(CONFIG, seed=1)


@pytest.fixture(scope="module")
def reference() -> Transformer:
    return tiny_model(CONFIG, seed=2)


def mean(losses: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(losses).mean()


def gradient(model: Transformer, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def same(model: Transformer, loss: torch.Tensor, expected: torch.Tensor) -> None:
    """Value and gradient."""
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(model, loss), gradient(model, expected), rtol=1e-4, atol=1e-6)


def test_gradient_ascent_is_minus_the_mean_loss_of_the_forget_targets(model):
    same(model, gradient_ascent(model, None, FORGOTTEN, None).total, -mean(token_losses(model, FORGOTTEN)))


def test_finetuning_is_the_mean_loss_of_the_retain_targets(model):
    same(model, finetune(model, None, None, RETAINED).total, mean(token_losses(model, RETAINED)))


def test_grad_diff_is_descent_minus_ascent(model):
    loss = grad_diff(model, None, FORGOTTEN, RETAINED, retain_weight=3.0)
    ascent, descent = mean(token_losses(model, FORGOTTEN)), mean(token_losses(model, RETAINED))
    same(model, loss.total, 3.0 * descent - ascent)
    assert loss.parts["loss/forget"] == pytest.approx(float(ascent.detach()), rel=1e-5)
    assert loss.parts["loss/retain"] == pytest.approx(float(descent.detach()), rel=1e-5)


def test_npo_by_hand(model, reference):
    loss = npo(model, reference, FORGOTTEN, RETAINED, beta=0.7, retain_weight=2.0)
    terms = []
    for now, before in zip(token_losses(model, FORGOTTEN), token_losses(reference, FORGOTTEN), strict=True):
        ratio = torch.exp(before.detach().sum() - now.sum())  # p / p_ref of a sequence
        terms.append(2 / 0.7 * torch.log(1 + ratio**0.7))
    same(model, loss.total, (terms[0] + terms[1]) / 2 + 2.0 * mean(token_losses(model, RETAINED)))
    assert loss.parts["loss/forget"] == pytest.approx(mean(token_losses(model, FORGOTTEN)).item(), rel=1e-5)
    assert all(parameter.grad is None for parameter in reference.parameters())


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_at_the_reference_npo_is_two_over_beta_times_log_two(model, beta):
    loss = npo(model, model, FORGOTTEN, RETAINED, beta=beta, retain_weight=0.0)
    assert float(loss.total.detach()) == pytest.approx(2 / beta * math.log(2), rel=1e-5)


def test_for_small_beta_the_gradient_of_npo_is_that_of_gradient_ascent(model, reference):
    """On the sum over a sequence: with as many targets in each, a factor of their number."""
    slope = gradient(model, npo(model, reference, FORGOTTEN, RETAINED, beta=1e-4, retain_weight=0.0).total)
    first, second = token_losses(model, FORGOTTEN)
    torch.testing.assert_close(slope, gradient(model, -(first.sum() + second.sum()) / 2), rtol=1e-2, atol=1e-4)


def test_simnpo_by_hand(model):
    loss = simnpo(model, None, FORGOTTEN, RETAINED, beta=2.5, gamma=0.4, forget_weight=0.5, retain_weight=2.0)
    terms = [
        -2 / 2.5 * torch.log(torch.sigmoid(2.5 * losses.mean() - 0.4)) for losses in token_losses(model, FORGOTTEN)
    ]
    same(model, loss.total, 0.5 * (terms[0] + terms[1]) / 2 + 2.0 * mean(token_losses(model, RETAINED)))


def test_defaults_are_those_of_the_papers():
    options = {name: method.options for name, method in METHODS.items()}
    assert options["npo"] == {"beta": 0.1, "retain_weight": 1.0}
    assert options["simnpo"] == {"beta": 4.5, "gamma": 0.0, "forget_weight": 0.125, "retain_weight": 1.0}
    assert options["rmu"] == {"layer": None, "coefficient": 6.5, "alpha": 1200.0, "seed": 0}
    assert options["gradient_ascent"] == options["finetune"] == {}
    steps = {name: (method.steps, method.divisor) for name, method in METHODS.items()}
    tofu = ("grad_diff", "npo", "simnpo", "finetune")
    assert steps == {"gradient_ascent": (125, 12), "rmu": (150, 6)} | dict.fromkeys(tofu, (125, 30))


def test_what_a_method_does_not_read_it_does_not_need(model, reference):
    for name, method in METHODS.items():
        texts = FORGOTTEN if method.forget else None, RETAINED if method.retain else None
        loss = method.loss(model, reference if method.reference else None, *texts)
        assert loss.total.dim() == 0 and loss.total.requires_grad, name
        assert not any(part.requires_grad for part in loss.parts.values()), name
