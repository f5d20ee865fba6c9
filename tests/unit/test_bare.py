"""Steps in a bare loop (sgtm/measure/bare.py): ours and those of the plain model train alike."""

from dataclasses import replace

import pytest
import torch
from plain_models import CPU, alike, as_plain

from sgtm.measure.cases import NONE, cases, random_batches

tiny_shapes = pytest.mark.parametrize("name", ["tiny", "tiny-llama"])
pytestmark = pytest.mark.usefixtures("benchmarks")


@tiny_shapes
def test_both_train_alike(name, ours):
    """Three steps of two micro-batches, AdamW included: the same master weights, and far from where they began."""
    setting, trained = ours(name)
    setting = replace(setting, micro_batch=2, accumulation=2)
    plain, unmasked = alike(setting, trained), cases(setting)[NONE]
    start = {key: master.clone() for key, master in plain.mixed.masters.items()}
    for _ in range(3):
        batches = random_batches(unmasked.batches, setting.model, CPU)
        trained.step("torch", unmasked.tables, batches)
        plain.step(batches)
        torch.testing.assert_close(plain.loss, trained.loss, rtol=1e-5, atol=0)
    wanted = as_plain(trained.mixed.model, trained.mixed.masters)
    for key, master in plain.mixed.masters.items():
        moved = (master - start[key]).abs().max().item()
        assert moved > 2e-4  # three steps of 1e-4
        torch.testing.assert_close(master, wanted[key], rtol=0, atol=0.1 * moved)
        assert (master - wanted[key]).abs().mean() < 1e-3 * moved
