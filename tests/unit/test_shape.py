"""The numbers that follow from a model's shape."""

from dataclasses import replace

import pytest

from sgtm.masking.shape import ModelShape

SHAPE = ModelShape(layers=5, hidden_size=48, heads=6, intermediate_size=64, vocab_size=100, context=32)


def test_heads_share_the_hidden_size_unless_they_are_given():
    assert (SHAPE.num_kv_heads, SHAPE.size_per_head) == (6, 8)
    shape = replace(SHAPE, kv_heads=2, head_dim=16)
    assert (shape.num_kv_heads, shape.size_per_head) == (2, 16)


def test_neurons_are_those_of_all_experts():
    assert (SHAPE.neurons, SHAPE.experts_run) == (64, 0)
    shape = replace(SHAPE, experts=6, experts_per_token=2, shared_experts=1)
    assert (shape.neurons, shape.experts_run) == (7 * 64, 3)


def test_every_other_layer_is_local_and_the_first_is_global():
    assert [replace(SHAPE, window=8).window_of(layer) for layer in range(5)] == [None, 8, None, 8, None]
    assert [SHAPE.window_of(layer) for layer in range(5)] == [None] * 5


@pytest.mark.parametrize(
    ("window", "keys"), [(None, 5 * 32), (8, 3 * 32 + 2 * 8), (64, 5 * 32)], ids=["global", "local", "wider than all"]
)
def test_flops_are_those_of_the_keys_in_reach(window, keys):
    shape = replace(SHAPE, window=window)
    assert shape.attention_flops() == 4 * keys * 48
    assert shape.flops_per_token(1000) == 6000 + 12 * keys * 48
    assert replace(shape, head_dim=16).attention_flops() == 4 * keys * 96, "of all heads, whatever the hidden size"
