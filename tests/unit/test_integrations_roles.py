"""Which module of an architecture belongs to whom: sgtm/integrations/roles.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sgtm.config.sections import MaskingConfig
from sgtm.integrations.roles import Family, Role, masked_modules, owned_parameters, partition_of
from sgtm.integrations.settings import space_of
from sgtm.integrations.stretches import Owned
from sgtm.model.rows import ALWAYS

HEADS, KV_HEADS, WIDTH, NEURONS, VOCAB = 4, 2, 8, 6, 11
MASKING = MaskingConfig(domains=["bio"], forget_heads=2, forget_neurons=1)
FAMILY = Family(
    "blocks",
    (
        Role("norm", "norm"),
        Role("qkv", "attn_in", "kv_heads", share=4),  # two queries, a key and a value for each KV head
        Role("out", "attn_out", "heads"),
        Role("up", "mlp_in", "neurons"),
        Role("down", "mlp_out", "neurons"),
    ),
    (Role("embedding", "embedding"), Role("head", "head")),
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * 4 * KV_HEADS, bias=False)
        self.out, self.up, self.down = nn.Linear(2 * HEADS, WIDTH), nn.Linear(WIDTH, NEURONS), nn.Linear(NEURONS, WIDTH)


class Model(nn.Module):
    def __init__(self, blocks: type = nn.ModuleDict):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        layers = [Block(), Block()]
        self.blocks = blocks(layers if blocks is nn.ModuleList else {str(n): block for n, block in enumerate(layers)})


def owned_of(model: nn.Module, masking: MaskingConfig = MASKING) -> dict[str, Owned]:
    partition = partition_of(model, FAMILY, HEADS, KV_HEADS, masking, space_of(masking))
    return owned_parameters(model, masked_modules(model, FAMILY, partition))


def owners(model: nn.Module, masking: MaskingConfig = MASKING) -> dict[str, list[tuple[str, int, int]]]:
    return {name: list(owned.ranges()) for name, owned in owned_of(model, masking).items()}


@pytest.mark.parametrize("blocks", [nn.ModuleDict, nn.ModuleList])
def test_groups_are_the_last_rows_or_columns(blocks):
    keys = owners(Model(blocks))
    assert list(keys) == [name for name, _ in Model(blocks).named_parameters()]
    for block in ("blocks.0", "blocks.1"):
        assert keys[f"{block}.qkv.weight"] == [("attn_in.retain", 0, 8), ("attn_in.bio", 8, 16)]
        assert keys[f"{block}.out.weight"] == [("attn_out.retain", 0, 4), ("attn_out.bio", 4, 8)]
        assert keys[f"{block}.out.bias"] == [("attn_out_bias", 0, WIDTH)]
        assert keys[f"{block}.up.bias"] == [("mlp_in.retain", 0, 5), ("mlp_in.bio", 5, 6)]
        assert keys[f"{block}.norm.bias"] == [("norm", 0, WIDTH)]
    assert keys["head.weight"] == [("head", 0, VOCAB)]
    by_columns = {name for name, owned in owned_of(Model(blocks)).items() if owned.dim == 1}
    assert by_columns == {f"blocks.{block}.{name}.weight" for block in (0, 1) for name in ("out", "down")}


def test_a_tied_matrix_has_both_kinds_and_a_free_layer_none():
    model = Model()
    model.head.weight = model.embedding.weight
    keys = owners(model, MASKING.model_copy(update={"masked_layers": [1]}))
    assert keys["embedding.weight"] == [("embedding+head", 0, VOCAB)] and "head.weight" not in keys
    assert {key for name, parts in keys.items() if name.startswith("blocks.0") for key, _, _ in parts} == {ALWAYS}


class Narrow(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).half()


def added(path: str, module: nn.Module) -> Model:
    model = Model()
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return model


@pytest.mark.parametrize(
    ("path", "module", "message"),
    [
        ("blocks.0.extra", nn.Linear(2, 2), r"blocks.0.extra \(Linear\) is unknown"),
        ("extra", nn.Linear(2, 2), "no mask covers the parameters extra.bias, extra.weight"),
        ("blocks.1.up", Narrow(WIDTH, NEURONS), "a linear layer of class Narrow"),
        ("blocks.1.qkv", nn.Linear(WIDTH, 14), "2 kv_heads of one size do not fit"),
        ("blocks.1.down", nn.Linear(NEURONS + 1, WIDTH), r"layers of \[6, 7\] neurons"),
        ("embedding", nn.Embedding(VOCAB, WIDTH, max_norm=1.0), "embedding .* cannot be masked"),
        ("head", nn.Linear(WIDTH, VOCAB), "head .* cannot be masked"),
        ("blocks.0.norm", nn.GroupNorm(2, WIDTH), "blocks.0.norm .* cannot be masked"),
    ],
)
def test_what_the_masks_would_miss_is_refused(path, module, message):
    with pytest.raises(ValueError, match=message):
        owners(added(path, module))


def test_listed_heads_are_refused():
    masking = MaskingConfig(domains=["bio"], forget_heads={"bio": [0, 1]}, forget_neurons=1)
    with pytest.raises(ValueError, match="here a domain has the last ones of each layer"):
        owners(Model(), masking)
