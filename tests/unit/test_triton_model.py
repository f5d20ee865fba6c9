"""A whole model on the Triton kernels, in the interpreter: gradients of the reference, and non-interference.

Each op's own tests (tests/kernels) are the thorough ones; here is what could go wrong between ops.
"""

import pytest
import torch
from families import (
    BIO,
    CODE,
    DENSE,
    FAMILIES,
    RETAIN,
    STRATEGIES,
    assert_promise,
    by_key,
    gradients,
    model_of,
    random_step,
)
from torch._dynamo.testing import CompileCounterWithBackend

pytestmark = pytest.mark.slow
by_family = pytest.mark.parametrize("family", FAMILIES)


@by_family
@pytest.mark.parametrize("mixing", ["sequence", "token"])
def test_gradients_are_those_of_the_reference(mixing, family):
    """To 1e-5 of the largest entry; the reference's own in fp32 are off by up to 5e-6."""
    tables, batches = STRATEGIES["sgtm+masked"](), random_step(mixing, seed=7, rows=3)
    exact = gradients(model_of(family, "reference").double(), batches, tables)
    ours = gradients(model_of(family, "triton"), batches, tables)
    assert ours.keys() == exact.keys()
    for name, want in exact.items():
        torch.testing.assert_close(ours[name].double(), want, rtol=0, atol=1e-5 * want.abs().max().item())


@by_family
def test_groups_without_heads_or_without_neurons(family):
    """One domain owns neurons alone, the other heads alone."""
    sizes = {"forget_heads": {"bio": 0, "code": 1}, "forget_neurons": {"bio": 3, "code": 0}}
    tables, batches = STRATEGIES["sgtm+masked"](), random_step("token", seed=7, rows=1)[:1]
    exact = gradients(model_of(family, "reference", **sizes).double(), batches, tables)
    ours = gradients(model_of(family, "triton", **sizes), batches, tables)
    for name, want in exact.items():
        torch.testing.assert_close(ours[name].double(), want, rtol=0, atol=1e-5 * want.abs().max().item())


@by_family
@pytest.mark.parametrize("mixing", ["sequence", "token"])
def test_non_interference(mixing, family):
    model, tables = model_of(family, "triton"), STRATEGIES["sgtm+masked"]()
    batches = random_step(mixing, seed=2, rows=3)[:1]
    before = by_key(model, gradients(model, batches, tables))
    for label in (RETAIN, BIO, CODE):
        assert_promise(model, batches, tables, before, label)


@pytest.mark.parametrize("family", DENSE)
def test_one_compiled_graph_trains_on_every_batch(family):
    """Fullgraph: no graph break in the model, and none of the batches' runs in the graph; the bits are the model's."""
    model, tables = model_of(family, "triton"), STRATEGIES["sgtm+masked"]()
    batches = random_step("token", seed=3, rows=3)
    plain = gradients(model, batches, tables)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend=counter)
    assert_equal(gradients(model, batches, tables), plain)
    assert counter.frame_count == 1


@by_family
def test_activation_checkpointing_changes_no_bit(family):
    tables, batches = STRATEGIES["sgtm+masked"](), random_step("token", seed=3, rows=3)[:1]
    plain, checkpointed = (
        gradients(model_of(family, "triton", activation_checkpointing=on), batches, tables) for on in (False, True)
    )
    assert_equal(checkpointed, plain)


def assert_equal(grads: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, gradient in wanted.items():
        assert torch.equal(grads[name], gradient), name
