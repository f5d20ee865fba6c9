"""A domain's own part of embedding and head: the formula, who learns, and what is left when the domain is removed.

The oracle of sgtm/model/domain_embedding.py computes the logits of every token by the shared head and by each domain's,
and adds them up with the factors of the token's label.
"""

from __future__ import annotations

import pytest
import torch
from families import (
    BIO,
    CODE,
    FAMILIES,
    MIXINGS,
    OPEN_BIO,
    OPENED,
    RETAIN,
    SPACE,
    UNLABELED,
    assert_promise,
    by_key,
    contribution,
    gradients,
    model_of,
    partition_of,
    plan_of,
    random_step,
    relabelled,
)

from sgtm.masking.strategy import build_tables, removal_tables
from sgtm.model.rows import live_keys
from sgtm.model.transformer import Transformer
from sgtm_kernels.embedding import embedding
from sgtm_kernels.testing import EXACT

by_family = pytest.mark.parametrize("family", FAMILIES)
by_backend = pytest.mark.parametrize("backend", EXACT)
by_rank = pytest.mark.parametrize("rank", ["full", 3])
TABLES = {
    "strict": build_tables(OPENED, "sgtm", "strict"),
    "free": build_tables(OPENED, "sgtm", "free"),
    "routing": build_tables(OPENED, "gradient_routing", "strict"),
    "titrated": build_tables(
        OPENED, "sgtm", "strict", overrides={"active.retain.bio": 0.5, "update_joint.retain.head": 2}
    ),
    "none": build_tables(OPENED, "none"),
}


class Oracle(Transformer):
    """Dense: every matrix for every token."""

    def _own(self, end: str, group: int) -> torch.Tensor:
        if self.partition.embedding == "full":
            return getattr(self, f"{end}_{group}")
        return getattr(self, f"{end}_{group}_rows") @ getattr(self, f"{end}_{group}_basis")

    def _by_token(self, plan, values) -> torch.Tensor:
        return torch.tensor(values)[plan.labels(torch.device("cpu")).long()]

    def embed(self, input_ids, plan):
        x = embedding(input_ids, self.embedding, plan, "embedding", "reference")
        for group in (1, 2):
            factor = self._by_token(plan, [row[group] for row in plan.tables.active])
            x = x + factor.view_as(input_ids)[..., None] * self._own("embedding", group)[input_ids]
        if self.position is None:
            return x
        positions = torch.arange(input_ids.shape[1]).repeat(len(input_ids))
        for start, end in plan.documents or ():
            positions[start:end] = torch.arange(end - start)
        positions = positions.view_as(input_ids)
        return x + embedding(positions, self.position, plan, "position", "reference")

    def loss(self, x, targets, plan, scale):
        x, targets = x.flatten(0, 1), targets.flatten()
        share = {kind: self._by_token(plan, row)[:, None] for kind, row in plan.tables.update_joint.items()}
        fixed = x.detach() @ self._head.T
        logits = x @ self._head.detach().T + share["head"] * (fixed - fixed.detach())
        if self.head_bias is not None:
            logits = logits + self.head_bias.detach() + share["head_bias"] * (self.head_bias - self.head_bias.detach())
        end = "embedding" if self.head is None else "head"
        for group in (1, 2):
            factor = self._by_token(plan, [row[group] for row in plan.tables.active])[:, None]
            logits = logits + factor * (x @ self._own(end, group).T)
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
        sums = torch.zeros(len(plan.tables.labels)).index_add(
            0, plan.labels(torch.device("cpu")).long(), losses.detach()
        )
        return losses.sum() * scale, sums


def oracle_of(model: Transformer) -> Oracle:
    oracle = Oracle(model.config, model.partition, "reference")
    oracle.load_state_dict(model.state_dict())
    return oracle


def batches_of(mixing: str):
    """All labels, or for `step` those of a domain alone."""
    return relabelled(random_step(mixing, seed=1), {UNLABELED: OPEN_BIO} if mixing == "token" else {})


@by_rank
@by_family
@by_backend
@pytest.mark.parametrize(
    ("name", "mixing"),
    [*(("strict", mixing) for mixing in MIXINGS), ("free", "sequence"), ("routing", "token"), ("titrated", "token"),
     ("titrated", "sequence"), ("none", "sequence")],
)  # fmt: skip
def test_losses_and_gradients_are_those_of_the_formula(name, mixing, backend, family, rank):
    model, tables = model_of(family, backend, embedding=rank), TABLES[name]
    oracle = oracle_of(model)
    for batch in batches_of(mixing):
        plan = plan_of(batch, tables)
        (loss, sums), (want, wanted) = (m(batch.input_ids, batch.targets, plan, 0.1) for m in (model, oracle))
        assert loss.item() == pytest.approx(want.item(), rel=2e-6)
        torch.testing.assert_close(sums, wanted, rtol=2e-6, atol=1e-6)
        assert not sums.requires_grad
    expected = gradients(oracle, batches_of(mixing), tables)
    for name_, gradient in gradients(model, batches_of(mixing), tables).items():
        error = (gradient - expected[name_]).abs().max().item()
        assert error <= 5e-6 * max(1e-2, expected[name_].abs().max().item()), name_


@by_rank
@by_family
@by_backend
@pytest.mark.parametrize(
    ("name", "mixing"), [("strict", "sequence"), ("strict", "token"), ("free", "token"), ("routing", "micro")]
)
def test_what_a_label_may_not_update_does_not_change_with_it(name, mixing, backend, family, rank):
    model, tables, batches = model_of(family, backend, embedding=rank), TABLES[name], batches_of(mixing)
    before = by_key(model, gradients(model, batches, tables))
    for label in (RETAIN, BIO, CODE):
        assert_promise(model, batches, tables, before, label)


@by_rank
@by_family
def test_a_part_that_no_token_reads_gets_zeros_and_is_frozen(family, rank):
    model, tables = model_of(family, embedding=rank), TABLES["strict"]
    for label, groups in ((RETAIN, ()), (BIO, ("bio",)), (UNLABELED, ("bio", "code"))):
        grads = gradients(model, random_step("step", 1, label), tables)  # no gradient is None
        live = live_keys(tables, [label])
        for part in model.domain_parts:
            read = part.key.partition(".")[2] in groups
            assert bool((grads[part.name] != 0).any()) == read == (part.key in live), part
            assert contribution(tables, part.key, label) == read


@by_rank
@by_family
@by_backend
def test_no_token_reads_a_part_whose_group_is_inactive(backend, family, rank):
    """Not even times 0: the parts are NaN."""
    model, tables = model_of(family, backend, embedding=rank), TABLES["strict"]
    with torch.no_grad():
        for part in model.domain_parts:
            if part.key.endswith("code"):
                getattr(model, part.name).fill_(torch.nan)
    for label in (RETAIN, BIO):
        assert all(bool(g.isfinite().all()) for g in gradients(model, random_step("step", 1, label), tables).values())


@by_rank
@by_family
def test_a_new_model_is_the_one_without_and_learns(family, rank):
    """At the start the parts add nothing, and the other weights are those of a model without them."""
    config = FAMILIES[family]
    sizes = {"forget_heads": config.heads // config.num_kv_heads, "forget_neurons": 1}
    torch.manual_seed(0)
    plain = Transformer(config, partition_of(SPACE, config, **sizes))
    torch.manual_seed(0)
    model = Transformer(config, partition_of(SPACE, config, **sizes, embedding=rank))
    shared = plain.state_dict()
    assert all(torch.equal(value, shared[name]) for name, value in model.state_dict().items() if name in shared)
    batch = random_step("sequence")[0]
    plan = plan_of(batch, build_tables(SPACE, "sgtm", "strict"))
    (loss, _), (want, _) = (m(batch.input_ids, batch.targets, plan, 0.1) for m in (model, plain))
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    loss.backward()
    for part in model.domain_parts:
        learns = not part.name.endswith("_rows")  # the basis is 0 at first
        assert bool((getattr(model, part.name).grad != 0).any()) == learns, part


@by_rank
@by_family
@by_backend
@pytest.mark.parametrize("removed", [(), ("bio",), ("code",), ("bio", "code")])
def test_logits_without_a_domain_are_those_of_zeros(removed, backend, family, rank):
    model, batch = model_of(family, backend, embedding=rank), random_step("sequence")[0]
    logits = model.logits(batch.input_ids, plan_of(batch, removal_tables(SPACE, removed)))
    x = model._hidden(batch.input_ids, plan_of(batch, removal_tables(SPACE, removed)))
    weight = (model.embedding if model.head is None else model.head).detach().clone()
    end = "embedding" if model.head is None else "head"
    for group, domain in ((1, "bio"), (2, "code")):
        if domain not in removed:
            parts = [getattr(model, p.name) for p in model.domain_parts if p.name.startswith(f"{end}_{group}")]
            weight += (parts[0] if len(parts) == 1 else parts[0] @ parts[1]).detach()
    torch.testing.assert_close(logits, torch.nn.functional.linear(x, weight, model.head_bias), rtol=1e-5, atol=1e-5)


def test_a_model_holds_nothing_of_its_forward_pass():
    """In ZeRO 3 it would hold the gathered weights."""
    model, batch = model_of("gpt_neo", embedding="full"), random_step("sequence")[0]
    plan = plan_of(batch, TABLES["strict"])
    model(batch.input_ids, batch.targets, plan, 1.0)
    assert model._parts == {}
    model.logits(batch.input_ids, plan)
    assert model._parts == {}
