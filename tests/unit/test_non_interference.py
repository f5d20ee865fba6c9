"""Promise 1 on whole models: what tokens may not update does not know, in any bit, what those tokens are.

For every preset, family, backend and mixing, all tokens of one label are replaced by others (and their targets with
them). The gradient of a row range, or joint parameter, must keep every bit exactly where the strategy's tables say
that the label contributes nothing, and must change where it contributes: so the variants' exempt parts (`no_mlp_out`
and its like) are not promised, and seen not to hold. Replacing forget tokens is the promise for the retain group;
replacing retain tokens, or another domain's, is the promise for a domain's group. That a group gets exactly 0 from a
step without any token that may update it is checked by mixing `step`.
"""

import pytest
import torch
from families import (
    BIO,
    CODE,
    FAMILIES,
    MIXINGS,
    OPEN_BIO,
    OPEN_CODE,
    OPENED,
    RETAIN,
    SPACE,
    STRATEGIES,
    UNLABELED,
    assert_promise,
    by_key,
    contribution,
    gradients,
    model_of,
    random_step,
    relabelled,
    with_content,
)

from sgtm.masking.strategy import STRATEGY_TABLES, build_tables
from sgtm_kernels.testing import EXACT

by_backend = pytest.mark.parametrize("backend", EXACT)
by_family = pytest.mark.parametrize("family", FAMILIES)


@by_backend
@by_family
@pytest.mark.parametrize("mixing", [m for m in MIXINGS if m != "step"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_mixed_steps(strategy, mixing, family, backend):
    model, tables, batches = model_of(family, backend), STRATEGIES[strategy](), random_step(mixing, seed=1)
    before = by_key(model, gradients(model, batches, tables))
    for label in (RETAIN, BIO, CODE):
        assert_promise(model, batches, tables, before, label)


@by_backend
@by_family
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_steps_of_one_label(strategy, family, backend):
    model, tables = model_of(family, backend), STRATEGIES[strategy]()
    for label in (UNLABELED, RETAIN, BIO, CODE):
        for (key, name, _), gradient in by_key(model, gradients(model, random_step("step", 1, label), tables)).items():
            zero = bool((gradient == 0).all())
            assert zero == (contribution(tables, key, label) == 0), f"{name} ({key}) under label {label}"


@by_backend
@by_family
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("strategy", ["sgtm", "sgtm+strict", "gradient_routing", "activation_masking", "gram", "none"])
def test_open_labels(strategy, mixing, family, backend):
    """Retain and joint learn from them, the other domain does not; forget tokens beside them stay out of retain."""
    tables, model = build_tables(OPENED, *strategy.split("+")), model_of(family, backend)
    opened = {UNLABELED: OPEN_BIO, CODE: OPEN_CODE}
    for label in (RETAIN, BIO, OPEN_BIO, OPEN_CODE):
        if label == RETAIN or mixing == "step":
            batches = relabelled(random_step(mixing, 7, label), opened)
            before = by_key(model, gradients(model, batches, tables))
        assert_promise(model, batches, tables, before, label)
        if mixing == "step":
            for (key, name, _), gradient in before.items():
                assert bool((gradient == 0).all()) == (contribution(tables, key, label) == 0), f"{name} under {label}"
    assert strategy == "none" or contribution(tables, "mlp_in.code", OPEN_BIO) == 0
    assert contribution(tables, "mlp_in.bio", OPEN_BIO) == contribution(tables, "mlp_in.retain", OPEN_BIO) == 1
    assert {row[OPEN_BIO] for row in tables.update_joint.values()} == {1}


EMPTY = {
    "neurons alone": ((0, 0), (3, 1)),
    "heads alone": ((1, 1), (0, 0)),
    "one of each": ((0, 1), (3, 0)),
}
"""Heads, in KV groups, and neurons of the domains."""


@by_backend
@by_family
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("owned", EMPTY)
def test_groups_without_heads_or_without_neurons(owned, mixing, family, backend):
    heads, neurons = (dict(zip(SPACE.domains, counts, strict=True)) for counts in EMPTY[owned])
    model = model_of(family, backend, forget_heads=heads, forget_neurons=neurons)
    for strategy in ("sgtm+masked", "gram"):
        tables = STRATEGIES[strategy]()
        for label in (RETAIN, BIO, CODE):
            if label == RETAIN or mixing == "step":
                batches = random_step(mixing, 7, label)
                before = by_key(model, gradients(model, batches, tables))
            owns = {piece: gradient for piece, gradient in before.items() if gradient.numel()}
            assert_promise(model, batches, tables, owns, label)


@by_family
@pytest.mark.parametrize("mixing", ["sequence", "token"])
@pytest.mark.parametrize("strategy", ["sgtm+masked", "gradient_routing", "activation_masking", "gram"])
def test_bf16(strategy, mixing, family):
    model, tables = model_of(family).bfloat16(), STRATEGIES[strategy]()
    batches = random_step(mixing, seed=2)
    before = by_key(model, gradients(model, batches, tables))
    for label in (RETAIN, BIO, CODE):
        assert_promise(model, batches, tables, before, label)


@by_backend
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_balanced_experts(strategy, mixing, backend):
    model, tables = model_of("mixtral", backend), STRATEGIES[strategy]()
    for label in (RETAIN, BIO, CODE):
        if label == RETAIN or mixing == "step":
            batches = random_step(mixing, 1, label)
            before = by_key(model, gradients(model, batches, tables, balance=3.0))
        assert_promise(model, batches, tables, before, label, balance=3.0)
        for (key, name, _), gradient in before.items() if mixing == "step" else ():
            assert bool((gradient == 0).all()) == (contribution(tables, key, label) == 0), f"{name} ({key}) of {label}"


@by_family
@pytest.mark.parametrize("mixing", ["sequence", "token"])
def test_activation_checkpointing_and_unmasked_layers(mixing, family):
    model, tables = model_of(family, masked_layers=[1], activation_checkpointing=True), STRATEGIES["sgtm+masked"]()
    batches = random_step(mixing, seed=3)
    before = by_key(model, gradients(model, batches, tables))
    for label in (RETAIN, BIO, CODE):
        assert_promise(model, batches, tables, before, label)


@by_family
def test_active_across_domains_is_not_promised_between_domains(family):
    """cross_domain: active lets a domain's tokens teach the other domain's group; retain tokens still do not."""
    tables = build_tables(SPACE, "sgtm", cross_domain="active")
    model, batches = model_of(family), random_step("sequence", seed=4)
    before = by_key(model, gradients(model, batches, tables))
    assert contribution(tables, "mlp_in.bio", CODE) == 1 and contribution(tables, "mlp_in.bio", RETAIN) == 0
    for label in (RETAIN, BIO, CODE):
        assert_promise(model, batches, tables, before, label)


@pytest.mark.parametrize("mixing", ["sequence", "token"])
def test_what_holds_the_retain_group_by_name(mixing):
    """The promise in the words of the method, without the tables: which retain weights forget tokens reach."""
    exempt = {
        "sgtm": set(),
        "no_mlp_out": {"mlp_out.retain"},
        "no_attn_out": {"attn_out.retain"},
        "no_out": {"mlp_out.retain", "attn_out.retain"},
        "gradient_routing": {"mlp_out.retain", "attn_out.retain"},
        "activation_masking": set(),
        "gram": set(),
        "sgtm+strict": set(),
        "none": {f"{part}.retain" for part in ("attn_in", "attn_out", "mlp_in", "mlp_out")},
    }
    assert set(exempt) >= set(STRATEGY_TABLES)
    model, batches = model_of("gpt_neo"), random_step(mixing, seed=5)
    others = [with_content(batch, [BIO, CODE], seed=6) for batch in batches]
    for strategy, reached in exempt.items():
        tables = STRATEGIES[strategy]()
        before, after = (by_key(model, gradients(model, step, tables)) for step in (batches, others))
        changed = {rows[0] for rows in before if not torch.equal(before[rows], after[rows])}
        assert {key for key in changed if key.endswith(".retain")} == reached, strategy
