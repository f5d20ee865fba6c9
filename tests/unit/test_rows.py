"""The row layout: every element of every parameter has one key, and a key lives exactly when its rows learn."""

from itertools import pairwise

import pytest
import torch
from families import (
    BIO,
    CODE,
    CONTEXT,
    FAMILIES,
    RETAIN,
    SPACE,
    STRATEGIES,
    UNLABELED,
    VOCAB,
    by_key,
    gradients,
    model_of,
    random_step,
)

from sgtm.masking.partition import ENDS
from sgtm.masking.strategy import removal_tables
from sgtm.model.rows import Rows, live_keys
from sgtm_kernels.plan import MaskPlan

by_family = pytest.mark.parametrize("family", FAMILIES)
by_layers = pytest.mark.parametrize("masked_layers", [None, [1], []])

PARTS = ("attn_in", "attn_out", "mlp_in", "mlp_out")


def owned(part: str) -> tuple[str, ...]:
    return tuple(f"{part}.{group}" for group in ("retain", "bio", "code"))


@by_family
@by_layers
def test_every_element_has_one_key(family, masked_layers):
    model = model_of(family, masked_layers=masked_layers)
    rows, parameters = model.parameter_rows(), dict(model.named_parameters())
    assert rows.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert (rows[name].bounds[0], rows[name].bounds[-1]) == (0, parameter.shape[0])
        assert len(rows[name].keys) == len(rows[name].bounds) - 1 == len(set(rows[name].keys))
        assert all(start < end for start, end in pairwise(rows[name].bounds))
        owners = torch.zeros(parameter.numel(), dtype=torch.int)
        for start, end, _ in rows[name].segments(parameter.numel() // parameter.shape[0]):
            owners[start:end] += 1
        assert bool((owners == 1).all())
        assert rows[name].decay == (parameter.dim() == 2)


def test_gpt_neo_by_hand():
    """Four heads of 4, one for each domain; ten neurons, three and one; hidden size 16."""
    rows = model_of("gpt_neo", masked_layers=[0]).parameter_rows()
    assert rows["blocks.0.attention.w_qkv"] == Rows(owned("attn_in"), (0, 24, 36, 48), True)
    assert rows["blocks.0.attention.w_o"] == Rows(owned("attn_out"), (0, 8, 12, 16), True)
    assert rows["blocks.0.attention.b_o"] == Rows(("attn_out_bias",), (0, 16), False)
    assert rows["blocks.0.mlp.w_in"] == Rows(owned("mlp_in"), (0, 6, 9, 10), True)
    assert rows["blocks.0.mlp.b_in"] == Rows(owned("mlp_in"), (0, 6, 9, 10), False)
    assert rows["blocks.0.mlp.w_out"] == Rows(owned("mlp_out"), (0, 6, 9, 10), True)
    assert rows["blocks.0.mlp.b_out"] == Rows(("mlp_out_bias",), (0, 16), False)
    for norm in ("attention_norm", "mlp_norm"):
        assert rows[f"blocks.0.{norm}.weight"] == rows[f"blocks.0.{norm}.bias"] == Rows(("norm",), (0, 16), False)
    assert rows["final_norm.weight"] == Rows(("final_norm",), (0, 16), False)
    assert rows["embedding"] == Rows(("embedding+head",), (0, VOCAB), True)
    assert rows["position"] == Rows(("position",), (0, CONTEXT), True)
    assert rows["head_bias"] == Rows(("head_bias",), (0, VOCAB), False)
    assert {key for name, layout in rows.items() if "blocks.1" in name for key in layout.keys} == {"always"}


def test_llama_by_hand():
    """Eight query and four KV heads of 4, a KV group for each domain; gate and up fused; untied head."""
    rows = model_of("llama").parameter_rows()
    assert rows["blocks.1.attention.w_qkv"] == Rows(owned("attn_in"), (0, 32, 48, 64), True)
    assert rows["blocks.1.attention.w_o"] == Rows(owned("attn_out"), (0, 16, 24, 32), True)
    assert rows["blocks.1.mlp.w_in"] == Rows(owned("mlp_in"), (0, 12, 18, 20), True)
    assert rows["blocks.1.mlp.w_out"] == Rows(owned("mlp_out"), (0, 6, 9, 10), True)
    assert (rows["embedding"].keys, rows["head"].keys) == (("embedding",), ("head",))


def test_segments_are_flat():
    rows = Rows(("a", "b"), (0, 2, 5), True)
    assert list(rows.segments(7)) == [(0, 14, "a"), (14, 35, "b")]


@by_family
@by_layers
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_key_is_live_exactly_when_its_rows_learn(strategy, masked_layers, family):
    model, tables = model_of(family, masked_layers=masked_layers), STRATEGIES[strategy]()
    for label in (UNLABELED, RETAIN, BIO, CODE):
        live = live_keys(tables, [label])
        for (key, name, _), gradient in by_key(model, gradients(model, random_step("step", 1, label), tables)).items():
            learns = gradient != 0
            assert bool(learns.any()) == (key in live), f"{name} ({key}) under label {label}"
            assert "." not in key or learns.all() == learns.any(), f"{name} ({key}): some rows under label {label}"


def test_live_keys_of_sgtm_by_hand():
    joint = {"norm", "final_norm", "embedding", "position", "head", "head_bias", "embedding+head", "always"}
    biases, tables = {"attn_out_bias", "mlp_out_bias"}, STRATEGIES["sgtm"]()

    def groups(*names: str) -> set[str]:
        own = {f"{end}.{name}" for end in ENDS for name in names if name != "retain"}
        return {f"{part}.{name}" for part in PARTS for name in names} | own

    assert live_keys(tables, []) == set()
    assert live_keys(tables, [UNLABELED]) == joint | biases | groups("retain", "bio", "code")
    assert live_keys(tables, [RETAIN]) == joint | biases | groups("retain")
    assert live_keys(tables, [BIO]) == joint | groups("bio")
    assert live_keys(tables, [CODE, BIO]) == joint | groups("bio", "code")
    masked = STRATEGIES["sgtm+masked"]()
    assert live_keys(masked, [CODE]) == {"final_norm", "head_bias", "always"} | groups("code")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_live_keys_of_a_mixed_step_are_those_of_its_labels(strategy):
    tables = STRATEGIES[strategy]()
    for labels in ([RETAIN, BIO], [BIO, CODE], [UNLABELED, CODE], [RETAIN, BIO, CODE]):
        assert live_keys(tables, labels) == frozenset().union(*(live_keys(tables, [label]) for label in labels))


@by_family
@pytest.mark.parametrize("domain", ["bio", "code"])
def test_keys_name_the_rows_that_removal_switches_off(family, domain):
    """With a domain removed, only its own rows can change without changing the logits."""
    model = model_of(family)
    ids = random_step("step")[0].input_ids
    plan = MaskPlan.uniform(removal_tables(SPACE, [domain]), UNLABELED, *ids.shape)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        expected = model.logits(ids, plan)
        for (key, name, start), piece in by_key(model, {n: p.data for n, p in weights.items()}).items():
            if name == "position" or name == "embedding" or name == "head" or name == "head_bias":
                continue
            original = piece.clone()
            piece += torch.linspace(1, 2, piece.numel())
            same = torch.equal(model.logits(ids, plan), expected)
            piece.copy_(original)
            assert same == key.endswith(f".{domain}"), f"{name} rows from element {start} ({key})"
