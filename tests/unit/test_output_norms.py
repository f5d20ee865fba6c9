"""Output norms against each group run alone, and that measuring them changes nothing."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from families import FAMILIES, MIXINGS, SPACE, STRATEGIES, model_of, partition_of, plan_of, random_step
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from sgtm.data.batch import IGNORE
from sgtm.model import experts
from sgtm.model.compile import compile_blocks
from sgtm.model.output_norms import OutputNorms
from sgtm.model.transformer import Transformer


def run(model, batches, tables, norms=None, grad: bool = False) -> list[torch.Tensor]:
    """Losses, and the gradients where `grad`."""
    tensors = []
    model.zero_grad(set_to_none=True)
    for batch in batches:
        loss, _ = model(batch.input_ids, batch.targets, plan_of(batch, tables), 1 / batch.step_targets, norms)
        tensors.append(loss.detach())
        if grad:
            loss.backward()
    return tensors + [p.grad for p in model.parameters() if grad]


def measured(model, batches, tables):
    norms = OutputNorms(tables)
    with torch.no_grad():
        run(model, batches, tables, norms)
    return norms.take()


def alone(layer, inputs, rows: tuple[int, int]) -> torch.Tensor:
    """What an attention or MLP gives where only these rows of its last weight are not 0, nor its bias."""
    weight, bias = (layer.w_o, layer.b_o) if hasattr(layer, "w_o") else (layer.w_out, getattr(layer, "b_out", None))
    originals = weight.detach().clone(), None if bias is None else bias.detach().clone()
    weight.zero_()[rows[0] : rows[1]] = originals[0][rows[0] : rows[1]]
    if bias is not None:
        bias.zero_()
    out = type(layer).forward(layer, *inputs)
    weight.copy_(originals[0])
    if bias is not None:
        bias.copy_(originals[1])
    return out


@torch.no_grad()
def by_hand(model, batches, tables):
    """Token norms of every batch by (part, group, layer), gathered through hooks; then their means by label."""
    groups, sums, counts = SPACE.groups, {}, torch.zeros(4)
    seen: dict = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda block, _, out, i=i: seen.update({("residual", None, i + 1): out}))
        for part, layer in (("attention", block.attention), ("mlp", block.mlp)):
            layer.register_forward_pre_hook(lambda layer, args, i=i, part=part: seen.update({(part, i): (layer, args)}))
    for batch in batches:
        seen.clear()
        run(model, [batch], tables)
        vectors = {key: seen[key] for key in list(seen) if key[0] == "residual"}
        vectors["residual", None, 0] = model.embed(batch.input_ids, plan_of(batch, tables))
        for (part, i), (layer, args) in [item for item in seen.items() if item[0][0] != "residual"]:
            bounds = layer.out_bounds if part == "attention" else layer.bounds
            for group, rows in enumerate(pairwise(bounds)):
                vectors[part, groups[group], i] = alone(layer, args, rows)
        labels = torch.repeat_interleave(torch.tensor(batch.labels), torch.tensor(batch.lengths))
        for label in range(4):
            chosen = (labels == label) & (batch.targets.flatten() != IGNORE)
            counts[label] += chosen.sum()
            for key, vector in vectors.items():
                sums[key, label] = sums.get((key, label), 0.0) + vector.flatten(0, 1)[chosen].norm(dim=-1).sum()
    return {
        (key, SPACE.labels[label]): float(value / counts[label])
        for (key, label), value in sums.items()
        if counts[label]
    }


def flat(norms) -> dict:
    values = {}
    for label, parts in norms.items():
        for part, by_group in parts.items():
            if part == "experts":  # no norms: `test_shares_are_those_of_the_choices`
                continue
            for group, by_layer in by_group.items() if part != "residual" else [(None, by_group)]:
                values |= {((part, group, layer), label): value for layer, value in enumerate(by_layer)}
    return values


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mixing", MIXINGS)
def test_norms_are_those_of_each_group_alone(family, mixing):
    for strategy in ("sgtm", "activation_masking", "none"):
        tables = STRATEGIES[strategy]()
        batches = random_step(mixing)
        norms = flat(measured(model_of(family), batches, tables))
        expected = by_hand(model_of(family), batches, tables)
        silent = {key for key, value in expected.items() if value == 0}
        assert norms.keys() == expected.keys() - silent
        assert (strategy == "none") == (not silent)
        for key, value in norms.items():
            assert value == pytest.approx(expected[key], rel=1e-4), key


def choices_by_hand(model, batches, tables, monkeypatch) -> dict[tuple[int, int], list[int]]:
    """How often the tokens of a label with a target have chosen each of eight experts, by (label, layer)."""
    counts, chosen, route = {}, [], experts.route
    with monkeypatch.context() as patch:
        patch.setattr(experts, "route", lambda *args: chosen.append(route(*args)) or chosen[-1])
        for batch in batches:
            chosen.clear()
            run(model, [batch], tables)
            labels = torch.repeat_interleave(torch.tensor(batch.labels), torch.tensor(batch.lengths))
            for (layer, (_, choices)), label in product(enumerate(chosen), range(4)):
                mine = choices.flatten(0, 1)[(labels == label) & (batch.targets.flatten() != IGNORE)]
                for expert in mine.flatten().tolist():
                    counts.setdefault((label, layer), [0] * 8)[expert] += 1
    return counts


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize(("strategy", "masked_layers"), [("sgtm", None), ("none", [1])])
def test_shares_are_those_of_the_choices(strategy, masked_layers, mixing, monkeypatch):
    """Over the micro-batches of a step. All experts of a layer without groups are retain's."""
    model, tables, batches = (
        model_of("mixtral", masked_layers=masked_layers),
        STRATEGIES[strategy](),
        random_step(mixing),
    )
    counts, measurement = choices_by_hand(model, batches, tables, monkeypatch), measured(model, batches, tables)
    expected: dict = {}
    for (label, layer), mine in sorted(counts.items()):
        whole = masked_layers is not None and layer not in masked_layers
        for group, (start, end) in enumerate([(0, 8)] if whole else [(0, 3), (3, 6), (6, 8)]):
            if whole or tables.active[label][group]:
                shares = [times / sum(mine) for times in mine[start:end]]
                of_label = expected.setdefault(SPACE.labels[label], {}).setdefault(SPACE.groups[group], [])
                of_label.append(pytest.approx((min(shares), max(shares)), rel=1e-4))
    assert {label: parts["experts"] for label, parts in measurement.items()} == expected


def test_the_largest_group_may_be_a_domains():
    model, tables, batches = model_of("gpt_neo"), STRATEGIES["none"](), random_step("token")
    layers = partition_of(SPACE, model.config, forget_heads=1, forget_neurons={"bio": 7, "code": 1})
    models = [Transformer(model.config, layers) for _ in range(2)]
    for other in models:
        other.load_state_dict(model.state_dict())
    norms, expected = flat(measured(models[0], batches, tables)), by_hand(models[1], batches, tables)
    assert norms == pytest.approx(expected, rel=1e-4)


def test_a_layer_without_groups_is_retains():
    tables = STRATEGIES["none"]()
    norms = measured(model_of("gpt_neo", masked_layers=[1]), random_step("step"), tables)["forget:bio"]
    assert [len(norms["mlp"][group]) for group in SPACE.groups] == [2, 1, 1] and len(norms["residual"]) == 3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_measuring_changes_no_bit_and_counts_once(family, checkpointing):
    tables, batches = STRATEGIES["sgtm"](), random_step("sequence")
    model, norms = model_of(family, activation_checkpointing=checkpointing), OutputNorms(tables)
    plain = run(model, batches, tables, grad=True)
    for a, b in zip(plain, run(model, batches, tables, norms, grad=True), strict=True):
        assert torch.equal(a, b)
    assert norms.take() == measured(model_of(family), batches, tables)


def test_compiled_blocks_show_the_residual_stream_and_are_not_compiled_again():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    tables, batches = STRATEGIES["sgtm"](), random_step("sequence")[:1]
    model, norms = model_of("gpt_neo"), OutputNorms(tables)
    compile_blocks(model, counter)
    plain, graphs = run(model, batches, tables, grad=True), counter.frame_count
    for a, b in zip(plain, run(model, batches, tables, norms, grad=True), strict=True):
        assert torch.equal(a, b)
    assert counter.frame_count == graphs
    compiled_norms, whole = norms.take(), measured(model_of("gpt_neo"), batches, tables)
    for label, parts in whole.items():
        assert compiled_norms[label].keys() == {"residual"}
        assert compiled_norms[label]["residual"] == pytest.approx(parts["residual"], rel=1e-4)


class Reads(TorchDispatchMode):
    """Ops that would wait for a device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "repeat_interleave")

    def __init__(self):
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.ops += [name] if name in self.WAITS else []
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_from_the_device_in_a_forward_pass():
    tables, batches = STRATEGIES["sgtm"](), random_step("token")
    model, norms = model_of("gpt_neo"), OutputNorms(tables)
    plans = [plan_of(batch, tables) for batch in batches]
    for plan in plans:
        plan.arrived(plan.by_token)
    with Reads() as plain:
        for batch, plan in zip(batches, plans, strict=True):
            model(batch.input_ids, batch.targets, plan, 1.0)
    with Reads() as with_norms:
        for batch, plan in zip(batches, plans, strict=True):
            model(batch.input_ids, batch.targets, plan, 1.0, norms)
    assert with_norms.ops == plain.ops
    with Reads() as reading:
        assert float(torch.ones(()))
    assert reading.ops == ["_local_scalar_dense"]
    assert norms.take().keys() == set(SPACE.labels)
