"""sgtm/hf/units.py: rows between the order of the groups and the original one."""

import torch

from sgtm.hf.units import Units, fuse, unfuse

UNITS = Units((2, 1, 1), (1, 3, 0, 2), 2)  # the original heads 1 and 3 are retain's, 0 and 2 those of two domains
ROWS = torch.tensor([10.0, 11, 30, 31, 0.5, 1, 20, 21])[:, None]


def original(factors, drop=False):
    return UNITS.to_original(ROWS, factors, drop).flatten().tolist()


def test_rows_return_to_their_original_order_and_back():
    assert original((1, 1, 1)) == [0.5, 1, 10, 11, 20, 21, 30, 31]
    assert torch.equal(UNITS.to_groups(UNITS.to_original(ROWS, (1, 1, 1), False)), ROWS)


def test_factor_0_zeroes_or_drops_and_another_multiplies():
    assert original((1, 0, 1)) == [0, 0, 10, 11, 20, 21, 30, 31]
    assert original((1, 0, 1), drop=True) == [10, 11, 20, 21, 30, 31]
    assert original((1, 0.5, 0), drop=True) == [0.25, 0.5, 10, 11, 30, 31]
    assert UNITS.remaining((1, 0, 1)) == 3 and UNITS.remaining((1, 0.5, 0)) == 3


def test_zeros_are_positive_whatever_was_there():
    rows = torch.tensor([1.0, 1, 1, 1, -1, float("inf"), 1, 1])[:, None]
    zeroed = UNITS.to_original(rows, (1, 0, 1), False)[:2]
    assert torch.equal(zeroed, torch.zeros(2, 1)) and not zeroed.signbit().any()


def test_a_layer_without_groups_loses_nothing():
    whole = Units((4,), (0, 1, 2, 3), 2)
    assert whole.remaining((1, 0, 0)) == 4
    assert torch.equal(whole.to_original(ROWS, (1, 0, 0.5), True), ROWS)


def test_fused_parts_come_apart_again():
    parts = [torch.arange(3.0), torch.arange(10.0, 15), torch.arange(20.0, 24)]
    counts = [(2, 1), (3, 2), (1, 3)]
    fused = fuse(parts, counts)
    assert fused.tolist() == [0, 1, 10, 11, 12, 20, 2, 13, 14, 21, 22, 23]
    assert all(torch.equal(a, b) for a, b in zip(unfuse(fused, counts), parts, strict=True))
