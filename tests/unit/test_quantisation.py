"""Rounded weights: levels, scales, and that nothing of a removed group is left in them."""

from __future__ import annotations

import pytest
import torch
from random_models import moved_model
from tiny import tiny_config

from sgtm.evaluation.quantisation import quantised, rounded


def test_levels_are_where_they_were():
    torch.manual_seed(0)
    levels = torch.randint(-7, 8, (5, 64)).float()
    levels[:, 0] = 7
    weight = levels * torch.tensor([[0.5], [1.0], [0.25], [2.0], [8.0]])
    assert torch.equal(rounded(weight, 4), weight)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("inputs", [1, 63, 64, 130])
def test_an_entry_moves_by_half_a_level_at_most(bits, inputs):
    torch.manual_seed(0)
    weight = torch.randn(7, inputs)
    moved = (rounded(weight, bits) - weight).abs()
    for start in range(0, inputs, 64):
        part = slice(start, start + 64)
        half = weight[:, part].abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1) / 2
        assert (moved[:, part] <= half * (1 + 1e-5)).all()
    levels = rounded(weight, bits)[0, :64].unique()
    assert len(levels) <= 2**bits - 1


def test_zeros_stay_zeros_and_one_bit_is_an_error():
    assert torch.equal(rounded(torch.zeros(3, 5), 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="got 1"):
        rounded(torch.ones(3, 5), 1)


@pytest.mark.parametrize("family", ["gpt_neo", "llama"])
def test_nothing_of_a_removed_group_is_in_the_weights(family):
    """The copy is the same whatever the group's weights are, also where they would set every scale."""
    config = tiny_config(model={"family": family, "hidden_size": 12, "window": 4 if family == "gpt_neo" else None})
    first, second = moved_model(config, 0.3), moved_model(config, 0.3)
    rows = second.parameter_rows()
    with torch.no_grad():
        for name, parameter in second.named_parameters():
            for key, start, end in zip(rows[name].keys, rows[name].bounds[:-1], rows[name].bounds[1:], strict=True):
                if key.endswith(".es") and name.startswith("blocks"):
                    parameter[start:end] *= 1000
    safe = [quantised(model, 4, ["es"]) for model in (first, second)]
    for (name, one), two in zip(safe[0].named_parameters(), safe[1].parameters(), strict=True):
        if not name.endswith("b_in"):
            assert torch.equal(one, two), name
    changed = [quantised(model, 4) for model in (first, second)]
    assert any(not torch.equal(a, b) for a, b in zip(changed[0].parameters(), changed[1].parameters(), strict=True))


def test_scales_are_of_outputs():
    """An output whose weights are small keeps its precision beside one whose weights are large."""
    config = tiny_config()
    model = moved_model(config, 0.3)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.w_out[:, 0] *= 1e4  # rows are inputs
            block.mlp.w_in[0] *= 1e4  # rows are outputs
    copy = quantised(model, 8)
    for block, rough in zip(model.blocks, copy.blocks, strict=True):
        assert float((block.mlp.w_out[:, 1:] - rough.mlp.w_out[:, 1:]).abs().max()) < 0.02
        assert float((block.mlp.w_in[1:] - rough.mlp.w_in[1:]).abs().max()) < 0.02


def test_the_model_itself_is_left_alone_and_an_unknown_domain_is_an_error():
    model = moved_model(tiny_config(), 0.3)
    before = [parameter.clone() for parameter in model.parameters()]
    quantised(model, 2, ["es"])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="no group fr"):
        quantised(model, 4, ["fr"])
