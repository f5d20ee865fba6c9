"""RMU against its formula, at its fixed point, and what of the model it changes."""

from __future__ import annotations

import pytest
import torch
from texts import CONFIG, FORGOTTEN, RETAINED
from tiny import tiny_model

from sgtm.unlearning.misdirection import direction, hidden_after, layer_of, rmu, steered

WIDTH = CONFIG.model.hidden_size


def states(model, text, layers: int) -> torch.Tensor:
    x = model.embed(text.input_ids, text.plan)
    for block in list(model.blocks)[:layers]:
        x = block(x, text.plan, None)
    return x[text.chosen]


def test_rmu_by_hand():
    model, reference = tiny_model(CONFIG, seed=1), tiny_model(CONFIG, seed=2)
    loss = rmu(model, reference, FORGOTTEN, RETAINED, layer=2, coefficient=3.0, alpha=7.0, seed=5)
    steering = (states(model, FORGOTTEN, 3) - 3.0 * direction(WIDTH, 5)).square().sum() / (8 * WIDTH)
    drift = (states(model, RETAINED, 3) - states(reference, RETAINED, 3)).square().sum() / (8 * WIDTH)
    torch.testing.assert_close(loss.total, steering + 7.0 * drift)
    assert loss.parts == {
        "distance/forget": pytest.approx(steering.item()),
        "distance/retain": pytest.approx(drift.item()),
    }


def test_the_loss_is_zero_at_the_target_with_retain_states_unchanged():
    model = tiny_model(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "embedding":
                parameter.copy_((2.5 * direction(WIDTH, 3)).expand_as(parameter))
            elif name == "position" or name.endswith(("w_o", "b_o", "w_out", "b_out")):
                parameter.zero_()
    loss = rmu(model, model, FORGOTTEN, RETAINED, layer=1, coefficient=2.5, seed=3)
    assert loss.total.item() == 0.0
    elsewhere = rmu(model, model, FORGOTTEN, RETAINED, layer=1, coefficient=2.5, seed=4)
    assert float(elsewhere.parts["distance/forget"]) > 0 == float(elsewhere.parts["distance/retain"])


def test_the_direction_is_a_unit_vector_of_the_seed():
    u = direction(64, 1)
    assert float(u.norm()) == pytest.approx(1.0) and (u >= 0).all() and u.std() > 0
    assert torch.equal(u, direction(64, 1)) and not torch.equal(u, direction(64, 2))


def test_the_layer_is_at_the_share_of_the_depth_that_the_paper_takes():
    assert [layer_of(count, None) for count in (32, 12, 6, 2, 1)] == [7, 2, 1, 0, 0]
    assert layer_of(4, 0) == 0 and layer_of(4, 3) == 3
    for layer in (-1, 4):
        with pytest.raises(ValueError, match=f"rmu: no layer {layer}: the model has 4, counted from 0"):
            layer_of(4, layer)


def test_the_layer_and_two_below_it_learn():
    model = tiny_model(CONFIG)
    cases = {0: [0], 1: [0, 1], 3: [1, 2, 3], None: [0]}
    for layer, layers in cases.items():
        assert steered(model, {"layer": layer}) == {f"blocks.{i}.mlp.w_out" for i in layers}


def test_hooks_are_removed():
    model = tiny_model(CONFIG)
    hidden_after(model, FORGOTTEN, 2)
    assert not model.blocks[2]._forward_hooks
