"""Ranges of rows and columns in the tensors that hold them: sgtm/integrations/stretches.py."""

from __future__ import annotations

import random

import pytest
import torch
from hf_models import CONFIGS, masked_model

from sgtm.integrations.stretches import merged, stretches


@pytest.mark.parametrize("family", CONFIGS)
def test_stretches_cover_every_parameter_and_every_fragment_of_it(family):
    rng = random.Random(0)
    for owned in masked_model(family).sgtm.owned.values():
        keys = sorted(set(owned.keys))
        expected = torch.full((owned.rows, owned.columns), -1)
        for key, start, end in owned.ranges():
            expected.narrow(owned.dim, start, end - start).fill_(keys.index(key))
        whole = torch.full_like(expected, -1)
        for stretch in stretches(owned):
            stretch.of(whole).fill_(keys.index(stretch.key))
        assert torch.equal(whole, expected)
        for _ in range(20):
            start, end = sorted(rng.sample(range(owned.rows * owned.columns + 1), 2))
            flat = torch.full((end - start + 7,), -1)
            for stretch in stretches(owned, start, end, 3):
                assert (stretch.of(flat) == -1).all()
                stretch.of(flat).fill_(keys.index(stretch.key))
            assert torch.equal(flat[3:-4], expected.flatten()[start:end])
            assert (flat[:3] == -1).all() and (flat[-4:] == -1).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stretches_that_are_joined_are_the_same_elements(family):
    for owned in masked_model(family).sgtm.owned.values():
        whole = list(stretches(owned))
        for live in (set(owned.keys), {key for key in owned.keys if not key.endswith(".code")}, set()):
            apart, joined = (torch.zeros(owned.rows, owned.columns) for _ in range(2))
            for stretch in whole:
                if stretch.key in live:
                    stretch.of(apart).add_(1)
            joint = list(merged(whole, frozenset(live), dict.fromkeys(owned.keys, 1)))
            for stretch in joint:
                stretch.of(joined).add_(1)
            assert torch.equal(apart, joined)
            assert len(joint) <= max(1, len(whole) - 1) and (live != set(owned.keys) or len(joint) == 1)
