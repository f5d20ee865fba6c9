"""A whole model on the Triton kernels, in the interpreter: gradients of the reference, and non-interference.

Each op's own tests (tests/kernels) are the thorough ones; here is what could go wrong between ops.

Faults tried, each seen to fail: TRITON_MODEL_FAULTS
"""

import pytest
import torch
from families import (
    BIO,
    CODE,
    FAMILIES,
    RETAIN,
    STRATEGIES,
    assert_promise,
    by_key,
    gradients,
    model_of,
    random_step,
)

by_family = pytest.mark.parametrize("family", FAMILIES)


@by_family
@pytest.mark.parametrize("mixing", ["sequence", "token"])
def test_gradients_are_those_of_the_reference(mixing, family):
    tables, batches = STRATEGIES["sgtm+masked"](), random_step(mixing, seed=7)
    ours, theirs = (gradients(model_of(family, backend), batches, tables) for backend in ("triton", "reference"))
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        torch.testing.assert_close(ours[name], want, rtol=1e-5, atol=2e-6 * want.abs().max().item(), msg=name)


@by_family
@pytest.mark.parametrize("mixing", ["sequence", "token"])
@pytest.mark.parametrize("strategy", ["sgtm+masked", "gram"])
def test_non_interference(strategy, mixing, family):
    model, tables = model_of(family, "triton"), STRATEGIES[strategy]()
    batches = random_step(mixing, seed=2)
    before = by_key(model, gradients(model, batches, tables))
    for label in (RETAIN, BIO, CODE):
        assert_promise(model, batches, tables, before, label)
