"""sgtm/model/experts.py: experts out of reach where their group is inactive, and gone where it is removed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import (
    BIO,
    CONTEXT,
    EXPERTS,
    FAMILIES,
    RETAIN,
    SPACE,
    STRATEGIES,
    UNLABELED,
    VOCAB,
    by_key,
    gradients,
    model_of,
    plan_of,
    random_step,
    relabelled,
)

from sgtm.masking.labels import LabelSpace
from sgtm.masking.partition import build_partition
from sgtm.masking.strategy import removal_tables
from sgtm.model.rows import Rows
from sgtm.model.transformer import Transformer
from sgtm_kernels.plan import MaskPlan
from sgtm_kernels.testing import EXACT

by_backend = pytest.mark.parametrize("backend", EXACT)
by_balance = pytest.mark.parametrize("balance", [0.0, 3.0])
IDS = torch.randint(VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(4))


def ablated(removed: tuple[str, ...]) -> MaskPlan:
    return MaskPlan.uniform(removal_tables(SPACE, removed), UNLABELED, *IDS.shape)


def without(model: Transformer, removed: tuple[str, ...]) -> Transformer:
    """A model of fewer experts and heads, and of no groups, with the rows that are left."""
    config, layer = model.config, model.partition.layers[0]
    left = [g for g, group in enumerate(SPACE.groups) if group not in removed]
    shape = replace(
        FAMILIES["mixtral"],
        heads=sum(layer.heads[g] for g in left),
        kv_heads=sum(layer.kv_heads[g] for g in left),
        experts=sum(layer.experts[g] for g in left),
    )
    counts = {"layers": 2, "heads": shape.heads, "kv_heads": shape.kv_heads, "neurons": shape.intermediate_size}
    whole = build_partition(
        LabelSpace(()), **counts, forget_heads=0, forget_neurons=0, experts=shape.experts, shared_experts=1
    )
    smaller = Transformer(shape, whole, model.backend)
    pieces: dict[str, list] = {}
    rows = model.parameter_rows()
    for name, tensor in model.state_dict().items():
        for start, end, key in rows[name].segments(1):
            if key.partition(".")[2] not in removed:
                pieces.setdefault(name, []).append((key.partition(".")[2], tensor[start:end]))
    state = {}
    for name, parts in pieces.items():
        if name.endswith("w_qkv"):  # of each group: queries, then keys and values
            split = [
                part.split([n * config.size_per_head for n in (layer.heads[g], layer.kv_heads[g], layer.kv_heads[g])])
                for g, (_, part) in zip(left, parts, strict=True)
            ]
            state[name] = torch.cat([piece for kind in zip(*split, strict=True) for piece in kind])
        else:
            state[name] = torch.cat([part for _, part in parts])
    smaller.load_state_dict(state)
    return smaller


@by_backend
@pytest.mark.parametrize("removed", SPACE.removals()[1:])
def test_a_removed_domain_is_a_model_of_fewer_experts(removed, backend):
    model = model_of("mixtral", backend).double()
    smaller = without(model, removed).double()
    whole = MaskPlan.uniform(removal_tables(LabelSpace(()), ()), 0, *IDS.shape)
    with torch.no_grad():
        ours, theirs, full = (
            model.logits(IDS, ablated(removed)),
            smaller.logits(IDS, whole),
            model.logits(IDS, ablated(())),
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert (full - ours).abs().max() > 1e-3


@by_backend
@by_balance
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "none"])
def test_retain_tokens_depend_on_no_weight_of_a_domain(strategy, balance, backend):
    """In any bit: their loss and all gradients, whatever the experts, heads and router rows of the domains are."""
    model, tables = model_of("mixtral", backend), STRATEGIES[strategy]()
    batches = random_step("step", 1, RETAIN)
    before = gradients(model, batches, tables, balance)
    loss = model(batches[0].input_ids, batches[0].targets, plan_of(batches[0], tables), 1.0)[0].detach()
    for (key, _, _), piece in by_key(model, {name: p.data for name, p in model.named_parameters()}).items():
        if key.endswith((".bio", ".code")):
            piece.copy_(torch.randn(piece.shape, generator=torch.Generator().manual_seed(7)) * 5)
    after = gradients(model, batches, tables, balance)
    assert torch.equal(loss, model(batches[0].input_ids, batches[0].targets, plan_of(batches[0], tables), 1.0)[0])
    assert all(torch.equal(before[name], after[name]) for name in before)


@by_backend
@by_balance
def test_retain_gradients_of_a_mixed_step_depend_on_no_weight_of_a_domain(balance, backend):
    model, tables = model_of("mixtral", backend), STRATEGIES["sgtm+masked"]()
    batches = relabelled(random_step("sequence", 1), {UNLABELED: RETAIN})
    before = by_key(model, gradients(model, batches, tables, balance))
    for (key, _, _), piece in by_key(model, {name: p.data for name, p in model.named_parameters()}).items():
        if key.endswith((".bio", ".code")):
            piece.mul_(-2)
    after = by_key(model, gradients(model, batches, tables, balance))
    for rows, gradient in before.items():
        if rows[0].endswith(".retain"):
            assert torch.equal(gradient, after[rows]), rows


def test_where_both_groups_are_active_the_router_couples_them():
    """What an unlabeled token teaches the retain group's router rows depends on the domain's experts."""
    model, tables = model_of("mixtral"), STRATEGIES["sgtm"]()
    batches = random_step("step", 1, UNLABELED)
    before = gradients(model, batches, tables)["blocks.1.mlp.router"]
    with torch.no_grad():
        model.blocks[1].mlp.w_out[model.blocks[1].mlp.bounds[1] :].mul_(-2)
    assert not torch.equal(before[:3], gradients(model, batches, tables)["blocks.1.mlp.router"][:3])


@pytest.mark.parametrize("masked_layers", [None, [1]])
def test_rows_by_hand(masked_layers):
    """Eight experts of 5 neurons, three for bio and two for code, and a shared one; hidden size 16."""
    rows = model_of("mixtral", masked_layers=masked_layers).parameter_rows()
    groups = ("retain", "bio", "code")
    assert rows["blocks.1.mlp.router"] == Rows(tuple(f"mlp_in.{g}" for g in groups), (0, 3, 6, 8), True)
    assert rows["blocks.1.mlp.w_in"] == Rows(tuple(f"mlp_in.{g}" for g in groups), (0, 40, 70, 90), True)
    assert rows["blocks.1.mlp.w_out"] == Rows(tuple(f"mlp_out.{g}" for g in groups), (0, 20, 35, 45), True)
    assert (rows["blocks.0.mlp.router"].keys == ("always",)) == (masked_layers is not None)
    assert EXPERTS == {"bio": 3, "code": 2}


def test_a_token_of_a_domain_alone_takes_what_experts_there_are():
    """With the retain group inactive (activation_masking) a domain of one expert has fewer than are to be chosen."""
    model = model_of("mixtral", forget_experts={"bio": 1, "code": 2})
    grads = gradients(model, random_step("step", 1, BIO), STRATEGIES["activation_masking"]())
    assert all(bool(gradient.isfinite().all()) for gradient in grads.values())
    own = grads["blocks.0.mlp.w_in"][2 * 5 * 6 : 2 * 5 * 7]
    assert bool((own != 0).all()) and bool((grads["blocks.0.mlp.router"] == 0).all()), "its weight is 1, whatever it is"
