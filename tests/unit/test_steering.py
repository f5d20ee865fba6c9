"""Steering: what is added to whom, to the bit; that nothing else changes; and the projections in the log."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import BIO, FAMILIES, MIXINGS, SPACE, STRATEGIES, gradients, model_of, plan_of, random_step
from tiny import tiny_config
from torch._dynamo.testing import CompileCounterWithBackend

from sgtm.data.batch import IGNORE
from sgtm.masking.strategy import removal_tables
from sgtm.model.compile import compile_blocks
from sgtm.model.direction import Direction
from sgtm.model.output_norms import OutputNorms
from sgtm.model.steering import Steering, _AddWhere

VECTOR = torch.linspace(-1.0, 2.0, 16)
TABLES = STRATEGIES["none"]()


def steering(strength: float = 0.5, layer: int = 0) -> Steering:
    return Steering(VECTOR, layer, strength, SPACE.group_of("bio"))


def steered_model(family: str = "gpt_neo", strength: float = 0.5, layer: int = 0, **changes):
    model = model_of(family, **changes)
    model.steering = steering(strength, layer)
    return model


def stream(model, batch, tables) -> tuple[torch.Tensor, torch.Tensor]:
    """[tokens, D] after the first block, and what the second one reads."""
    seen: list[torch.Tensor] = []
    hooks = [
        model.blocks[0].register_forward_hook(lambda block, inputs, x: seen.append(x.detach().clone())),
        model.blocks[1].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].detach().clone())),
    ]
    model(batch.input_ids, batch.targets, plan_of(batch, tables), 1.0)
    for hook in hooks:
        hook.remove()
    before, after = seen
    return before.flatten(0, 1), after.flatten(0, 1)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


def labels_of(batch) -> torch.Tensor:
    return torch.repeat_interleave(torch.tensor(batch.labels), torch.tensor(batch.lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mixing", MIXINGS)
def test_the_direction_is_added_to_forget_tokens_and_no_other_token_changes_a_bit(mixing, family, dtype):
    for strategy, strength in (("none", 0.5), ("sgtm", -2.0)):
        model, tables = steered_model(family, strength).to(dtype), STRATEGIES[strategy]()
        for batch in random_step(mixing):
            before, after = stream(model, batch, tables)
            chosen = labels_of(batch) == BIO
            assert torch.equal(bits(after[chosen]), bits(before[chosen] + (strength * VECTOR).to(dtype)))
            assert torch.equal(bits(after[~chosen]), bits(before[~chosen]))


def test_a_negative_zero_keeps_its_sign_in_both_passes():
    x = torch.full((1, 2, 3), -0.0, requires_grad=True)
    chosen = torch.tensor([[[True], [False]]])
    out = _AddWhere.apply(x, torch.ones(3), chosen)
    assert out[0, 0].tolist() == [1.0] * 3 and torch.equal(bits(out[0, 1]), bits(x.detach()[0, 1]))
    out.backward(torch.full_like(x, -0.0))
    assert torch.equal(bits(x.grad), bits(torch.full_like(x, -0.0)))


@pytest.mark.parametrize(
    ("removed", "added"), [((), True), (("code",), True), (("bio",), False), (("bio", "code"), False)]
)
@pytest.mark.parametrize("groups", [True, False])
def test_in_an_evaluation_all_tokens_are_steered_or_none(removed, added, groups):
    tables = removal_tables(SPACE, removed, groups)
    assert all(all(row) for row in tables.active) == (not removed or not groups)
    for batch in random_step("token"):
        before, after = stream(steered_model(), batch, tables)
        assert torch.equal(bits(after), bits(before + 0.5 * VECTOR if added else before))


def test_with_strength_0_or_no_such_token_the_stream_is_handed_on_as_it_is():
    x = torch.randn(2, 12, 16)
    (batch, *_) = random_step("step")
    assert steering(0.0).add(x, plan_of(batch, TABLES)) is x
    (other, *_) = random_step("step", label=BIO + 1)
    assert steering().add(x, plan_of(other, TABLES)) is x
    assert steering().add(x, plan_of(batch, TABLES)) is not x


@pytest.mark.parametrize("mixing", MIXINGS)
def test_strength_0_gives_the_same_gradients_to_the_bit_and_another_does_not(mixing):
    batches, tables = random_step(mixing), STRATEGIES["sgtm"]()
    plain, zero, steered = (
        gradients(model, batches, tables)
        for model in (model_of("llama"), steered_model("llama", 0.0), steered_model("llama"))
    )
    assert all(torch.equal(plain[name], zero[name]) for name in plain)
    assert any(not torch.equal(plain[name], steered[name]) for name in plain)


def test_the_gradient_is_that_of_the_function():
    (batch, *_), vector = random_step("token"), VECTOR.double()
    plan, at_bio = plan_of(batch, TABLES), (labels_of(batch) == BIO).view(*batch.input_ids.shape, 1)
    x = torch.randn(*batch.input_ids.shape, 16, dtype=torch.float64, requires_grad=True)
    assert torch.equal(steering(2.0).add(x, plan), x + 2.0 * vector * at_bio)
    assert torch.autograd.gradcheck(lambda x: steering(2.0).add(x, plan)[:2, ::3].sin(), x.detach().requires_grad_())


def test_recomputed_blocks_give_the_same_gradients():
    batches = random_step("sequence")
    plain = gradients(steered_model(), batches, TABLES)
    again = gradients(steered_model(activation_checkpointing=True), batches, TABLES)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_compiled_blocks_have_the_same_graphs_and_are_steered_too():
    batches, streams, graphs = random_step("token")[:1], [], []
    for strength in (None, 0.5):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model = model_of("gpt_neo")
        model.steering = None if strength is None else steering(strength)
        compile_blocks(model, counter)
        streams.append(gradients(model, batches, TABLES))
        graphs.append(counter.frame_count)
    plain = gradients(steered_model(), batches, TABLES)
    assert graphs[0] == graphs[1]
    for name, expected in plain.items():
        torch.testing.assert_close(streams[1][name], expected, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(streams[0][name], streams[1][name]) for name in plain)


def test_it_is_in_no_state_of_the_model():
    model, plain = steered_model(), model_of("gpt_neo")
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert len(list(model.parameters())) == len(list(plain.parameters())) and not list(model.buffers())


@pytest.mark.parametrize("strength", [0.0, 3.0])
def test_projections_are_of_the_stream_before_anything_is_added(strength):
    model, norms = steered_model(strength=strength, activation_checkpointing=True), OutputNorms(TABLES)
    batches, sums, counts = random_step("token"), torch.zeros(4), torch.zeros(4)
    for batch in batches:
        before, _ = stream(model, batch, TABLES)
        chosen = batch.targets.flatten() != IGNORE
        for label, value in zip(labels_of(batch)[chosen], (before @ VECTOR / VECTOR.norm())[chosen], strict=True):
            sums[label], counts[label] = sums[label] + value, counts[label] + 1
        loss, _ = model(batch.input_ids, batch.targets, plan_of(batch, TABLES), 1.0, norms)
        loss.backward()
    taken = norms.take()
    for label, name in enumerate(SPACE.labels):
        assert taken[name]["projection"] == pytest.approx(float(sums[label] / counts[label]), rel=1e-4)
    plain = OutputNorms(TABLES)
    for batch in batches:
        model_of("gpt_neo")(batch.input_ids, batch.targets, plan_of(batch, TABLES), 1.0, plain)
    assert all("projection" not in parts for parts in plain.take().values())


def test_layer_and_strength_are_those_of_the_config_and_the_layer_else_of_the_file():
    vectors = np.arange(18, dtype=np.float32).reshape(2, 9)
    direction = Direction(vectors, {"domain": "es", "layer": 1}, "")
    for own, expected in ((None, 1), (0, 0)):
        config = tiny_config(steering={"direction": "x", "layer": own, "strength": -2.0})
        made = Steering.of(config, direction)
        assert (made.layer, made.strength, made.group) == (expected, -2.0, 1)
        x, plan = torch.zeros(1, 6, 9), SimpleNamespace(tables=removal_tables(config.space, ()), present=(0,))
        assert torch.equal(made.add(x, plan)[0, 0], -2.0 * torch.from_numpy(vectors[expected]))
    assert Steering.of(tiny_config(), None) is None
