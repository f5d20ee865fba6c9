"""Which heads and neurons belong to whom: by count, by list, by percent, in some layers, by whole KV groups."""

import pytest

from sgtm.masking.labels import LabelSpace
from sgtm.masking.partition import LayerPartition, added_widths, build_partition

SPACE = LabelSpace(("bio", "code"))
SHAPE = {"layers": 3, "heads": 8, "kv_heads": 4, "neurons": 10}


def build(**changes):
    return build_partition(SPACE, **SHAPE | {"forget_heads": 2, "forget_neurons": 3} | changes)


def test_counts_take_from_the_end():
    partition = build()
    assert partition.groups == ("retain", "bio", "code")
    assert partition.layers == (LayerPartition((4, 2, 2), (2, 1, 1), (4, 3, 3), tuple(range(8)), tuple(range(10))),) * 3
    layer = partition.layers[0]
    assert (layer.head_bounds, layer.kv_bounds, layer.neuron_bounds) == ((0, 4, 6, 8), (0, 2, 3, 4), (0, 4, 7, 10))


def test_counts_by_domain():
    layer = build(forget_heads={"code": 4, "bio": 2}, forget_neurons={"code": 1, "bio": 5}).layers[0]
    assert (layer.heads, layer.kv_heads, layer.neurons) == ((2, 2, 4), (1, 1, 2), (4, 5, 1))


def test_lists_are_permuted_to_be_contiguous():
    layer = build(
        forget_heads={"bio": [5, 4], "code": [0, 1]}, forget_neurons={"bio": [9, 0], "code": [4, 8, 2]}
    ).layers[0]
    assert layer.head_order == (2, 3, 6, 7, 4, 5, 0, 1)
    assert layer.neuron_order == (1, 3, 5, 6, 7, 0, 9, 2, 4, 8)
    assert (layer.heads, layer.kv_heads, layer.neurons) == ((4, 2, 2), (2, 1, 1), (5, 2, 3))


def test_a_list_beside_a_count():
    layer = build(forget_heads={"bio": 2, "code": [2, 3]}, forget_neurons={"bio": 2, "code": [9]}).layers[0]
    assert layer.head_order == (0, 1, 4, 5, 6, 7, 2, 3)
    assert layer.neuron_order == (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert layer.neurons == (7, 2, 1)


@pytest.mark.parametrize(
    ("percent", "heads", "neurons"),
    [
        (25, (4, 2, 2), (6, 2, 2)),  # 2.5 neurons round to 2
        (1, (4, 2, 2), (8, 1, 1)),  # at least one of each
        ({"bio": 30, "code": 12.5}, (4, 2, 2), (6, 3, 1)),
        ({"bio": 50, "code": 20}, (2, 4, 2), (3, 5, 2)),
    ],
)
def test_percent(percent, heads, neurons):
    layer = build(percent=percent).layers[0]
    assert (layer.heads, layer.neurons) == (heads, neurons)


def test_masked_layers():
    partition = build(masked_layers=[1])
    assert [partition.masked(i) for i in range(3)] == [False, True, False]
    assert partition.layers[0] == LayerPartition((8,), (4,), (10,), tuple(range(8)), tuple(range(10)))
    assert partition.layers[1] == build().layers[1]


def test_a_domain_may_own_neurons_alone():
    for none in ([], 0):
        layer = build(forget_heads={"bio": none, "code": 2}).layers[0]
        assert (layer.heads, layer.head_bounds) == ((6, 0, 2), (0, 6, 6, 8))
    layer = build(forget_heads=0).layers[0]
    assert (layer.heads, layer.kv_heads, layer.neurons) == ((8, 0, 0), (4, 0, 0), (4, 3, 3))


def test_a_domain_may_own_heads_alone():
    layer = build(forget_neurons={"bio": 0, "code": 3}).layers[0]
    assert (layer.heads, layer.neurons, layer.neuron_bounds) == ((4, 2, 2), (7, 0, 3), (0, 7, 7, 10))


def test_a_domain_may_own_embeddings_alone():
    nothing = {"forget_heads": {"bio": 0, "code": 2}, "forget_neurons": {"bio": 0, "code": 3}}
    assert build(**nothing, embedding=4).layers[0].heads == (6, 0, 2)
    with pytest.raises(ValueError, match="forget_heads bio: 0, with forget_neurons 0, leaves the domain no group"):
        build(**nothing)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (12, 6, 16, {"bio": 2, "code": 2}, {"bio": 3, "code": 3})),
        ({"forget_heads": {"code": 4, "bio": 0}}, (12, 6, 16, {"code": 4, "bio": 0}, {"bio": 3, "code": 3})),
        ({"percent": 50}, (16, 8, 20, {"bio": 4, "code": 4}, {"bio": 5, "code": 5})),
    ],
)
def test_groups_are_added_to_the_widths(sizes, expected):
    shape = {"heads": 8, "kv_heads": 4, "neurons": 10}
    widths = added_widths(SPACE, **shape | {"forget_heads": 2, "forget_neurons": 3} | sizes)
    assert widths == expected
    sizes = {"forget_heads": widths.forget_heads, "forget_neurons": widths.forget_neurons}
    layer = build(heads=widths.heads, kv_heads=widths.kv_heads, neurons=widths.neurons, **sizes).layers[0]
    assert (layer.heads[0], layer.kv_heads[0], layer.neurons[0]) == (8, 4, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forget_heads": 1}, r"forget_heads bio: 2 query heads share a KV head; give a multiple of 2 in place of 1"),
        ({"forget_heads": {"bio": [0, 2], "code": 2}}, r"forget_heads bio: .*; list all of 0-1 or none, got \[0, 2\]"),
        ({"forget_heads": 4}, r"forget_heads: 8 of 8 would be forget"),
        ({"forget_neurons": 5}, r"forget_neurons: 10 of 10 would be forget"),
        ({"forget_neurons": {"bio": list(range(10)), "code": []}}, r"forget_neurons: 10 of 10"),
        ({"percent": 60}, r"forget_heads: 8 of 8"),
        ({"forget_neurons": {"bio": [1, 2], "code": [2]}}, r"forget_neurons: indices must be distinct.*0\.\.9"),
        ({"forget_heads": {"bio": [8, 9], "code": 2}}, r"forget_heads: indices must be.*0\.\.7, got \[8, 9\]"),
        ({"forget_heads": {"bio": 2}}, r"forget_heads must name every domain \(bio, code\), got \['bio'\]"),
        ({"percent": {"bio": 2, "chem": 2}}, r"percent must name every domain"),
        ({"masked_layers": [0, 3]}, r"masked_layers \[0, 3\] name a layer outside 0\.\.2"),
    ],
)
def test_errors_name_the_key(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)
