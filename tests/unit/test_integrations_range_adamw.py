"""AdamW that freezes rows and columns: sgtm/integrations/range_adamw.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sgtm.integrations.range_adamw import RangeAdamW, frozen_ranges

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
COLUMNS = (slice(None), slice(2, 4))


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5), nn.LayerNorm(5))


def step(model, optimizer, seed: int = 0) -> None:
    ids = torch.randint(9, (4, 7), generator=torch.Generator().manual_seed(seed))
    model(ids).pow(3).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def state(model, optimizer) -> dict[tuple[str, str], torch.Tensor]:
    parts = {("weight", name): p for name, p in model.named_parameters()}
    for moment in ("exp_avg", "exp_avg_sq"):
        parts |= {(moment, name): optimizer.state[p][moment] for name, p in model.named_parameters()}
    return {key: tensor.detach().clone() for key, tensor in parts.items()}


def test_frozen_ranges_keep_every_bit_and_the_rest_is_adamw():
    model, plain = model_of(), model_of()
    ours = RangeAdamW(model, {"0.weight": [slice(0, 2), slice(-3, None)], "1.weight": COLUMNS}, **OPTIONS)
    theirs = torch.optim.AdamW(plain.parameters(), **OPTIONS)
    begin = {name: p.detach().clone() for name, p in model.named_parameters()}
    for seed in range(3):
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=torch.Generator().manual_seed(seed))
            other.grad = mine.grad.clone()
        ours.step()
        theirs.step()
    frozen = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in begin.items()}
    frozen["0.weight"][[0, 1, 6, 7, 8]] = True
    frozen["1.weight"][:, 2:4] = True
    for name, parameter in model.named_parameters():
        mask, other = frozen[name], dict(plain.named_parameters())[name]
        assert torch.equal(parameter[mask], begin[name][mask])
        assert torch.allclose(parameter[~mask], other[~mask], atol=1e-7, rtol=0)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not ours.state[parameter][moment][mask].any()
            assert torch.allclose(ours.state[parameter][moment][~mask], theirs.state[other][moment][~mask], atol=1e-7)


def test_zero_gradients_are_no_freeze():
    """Why a mask on the gradient does not do it: decay and momentum move the rows (docs/masked-gradients.md)."""
    model = model_of()
    before = model[0].weight.detach().clone()
    model[0].weight.register_hook(lambda grad: grad * 0)
    step(model, torch.optim.AdamW(model.parameters(), **OPTIONS))
    assert (model[0].weight != before).all()


def test_a_loaded_state_continues_to_the_bit(tmp_path):
    frozen = {"0.weight": slice(0, 4)}
    model = model_of()
    optimizer = RangeAdamW(model, frozen, **OPTIONS)
    step(model, optimizer)
    step(model, optimizer, 1)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state")
    other = model_of(1)
    resumed = RangeAdamW(other, frozen, **OPTIONS)
    weights, states = torch.load(tmp_path / "state", weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(states)
    step(model, optimizer, 2)
    step(other, resumed, 2)
    theirs = state(other, resumed)
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in state(model, optimizer).items())


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        ({"0.weights": slice(1)}, r"frozen has '0.weights', which is unknown \(did you mean 0.weight\?\)"),
        ({"0.weight": slice(0, 10)}, "a range of its 9 rows"),
        ({"0.weight": slice(3, 3)}, "a range of its 9 rows, not an empty one"),
        ({"0.weight": slice(0, 4, 2)}, "a range of its 9 rows"),
        ({"0.weight": 3}, r"frozen\['0.weight'\] is 3; give slice\(start, end\)"),
        ({"0.weight": [slice(0, 4), slice(3, 5)]}, "ranges that overlap at 3"),
        ({"0.weight": [slice(0, 4), COLUMNS]}, "rows and columns"),
        ({"0.weight": (slice(0, 4), slice(0, 4))}, "all of some columns of a matrix"),
        ({"1.bias": COLUMNS}, r"give slice\(start, end\) of rows"),
        ({"2.weight": slice(0, 1)}, "'2.weight', which does not need gradients"),
    ],
)
def test_what_cannot_be_frozen_is_an_error(frozen, message):
    model = model_of()
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        RangeAdamW(model, frozen)


def test_tied_and_left_out_parameters_are_errors():
    model = model_of()
    model[1].weight = nn.Parameter(model[0].weight.detach()[:5].clone())
    with pytest.raises(ValueError, match="does not train at all"):
        RangeAdamW(model, {"0.weight": slice(1)}, model[1].parameters())
    tied = nn.ModuleDict({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)})
    tied["two"].weight = tied["one"].weight
    before = copy.deepcopy(tied["one"].weight)
    with pytest.raises(ValueError, match="tied to another"):
        RangeAdamW(tied, {"one.weight": slice(1), "two.weight": slice(1)})
    optimizer = RangeAdamW(tied, {"two.weight": slice(1)}, **OPTIONS)  # the second name of the matrix
    tied["two"](tied["one"](torch.ones(2, 3))).sum().backward()
    optimizer.step()
    assert (tied["one"].weight != before).any(1).tolist() == [False, True, True]


def test_ranges_cover_the_parameter():
    owned = frozen_ranges("x", [slice(4, 6), slice(0, 2)], (9, 2, 3))
    assert (owned.dim, owned.rows, owned.columns) == (0, 9, 6)
    assert list(zip(owned.bounds[1:], owned.keys, strict=True)) == [
        (2, "frozen"),
        (4, "live"),
        (6, "frozen"),
        (9, "live"),
    ]
    assert frozen_ranges("x", slice(None), (3,)).keys == ("frozen",)


def test_a_closure_computes_the_loss_and_its_gradients_first():
    model, other = model_of(), model_of()
    ours, theirs = RangeAdamW(model, {}, **OPTIONS), RangeAdamW(other, {}, **OPTIONS)
    ids = torch.arange(8).view(2, 4)

    def closure():
        ours.zero_grad()
        loss = model(ids).pow(3).mean()
        loss.backward()
        return loss

    loss_of_other = other(ids).pow(3).mean()
    loss_of_other.backward()
    theirs.step()
    assert torch.equal(ours.step(closure), loss_of_other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
