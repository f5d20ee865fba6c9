"""The plain model of the benchmarks (sgtm/measure/plain.py) computes our function, so that times may be compared."""

import pytest
import torch
from plain_models import CPU, alike, as_plain

from sgtm.measure.cases import NONE, cases, random_batches

tiny_shapes = pytest.mark.parametrize("name", ["tiny", "tiny-llama"])
pytestmark = pytest.mark.usefixtures("benchmarks")


@tiny_shapes
@pytest.mark.parametrize("compiled", [False, True])
def test_the_plain_model_is_our_function(name, compiled, ours):
    """Loss and gradients; and it is one graph for torch.compile, through which its hooks gather gradients."""

    setting, trained = ours(name)
    plain = alike(setting, trained)
    function = (
        torch.compile(plain.model, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else plain.model
    )
    unmasked = cases(setting)[NONE]
    batch = random_batches(unmasked.batches, setting.model, CPU)[0]
    arguments = (batch.input_ids, batch.targets)
    theirs = function(*arguments, 0.01)
    loss, _ = trained.mixed.model(*arguments, batch.plan(unmasked.tables), 0.01)
    torch.testing.assert_close(theirs, loss, rtol=1e-5, atol=0)
    theirs.backward()
    loss.backward()
    wanted = as_plain(trained.mixed.model, {name: m.grad for name, m in trained.mixed.masters.items()})
    for key, master in plain.mixed.masters.items():
        largest = wanted[key].abs().max().item()
        assert largest > 0
        torch.testing.assert_close(master.grad, wanted[key], rtol=0, atol=2e-5 * largest)
