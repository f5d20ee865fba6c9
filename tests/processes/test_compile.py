"""`train.compile: blocks`: the losses and gradients of the model as it is, from one graph for each mask signature.

They differ by rounding; rows that masks leave alone are exactly 0 in both. The backend aot_eager of torch.compile runs
the captured graph op by op and needs no compiler.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from families import (
    BIO,
    DENSE,
    MIXINGS,
    SPACE,
    STRATEGIES,
    UNLABELED,
    assert_promise,
    by_key,
    gradients,
    model_of,
    plan_of,
    random_step,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.exc import TritonMissing

from sgtm.masking.strategy import removal_tables
from sgtm.model.compile import check_compiler, compile_blocks

# Of all strategies and mixings together, whatever the code makes of them: signatures, and pairs of one and a shape.
SIGNATURES, PAIRS = 6, 9
KINDS_OF_LAYERS = {"gpt_neo": 2, "llama": 1}  # global and local


class Pair:
    """The same model as it is and compiled, and the graphs that there should be."""

    def __init__(self, family: str, backend: str = "aot_eager", kernels: str = "torch", **changes):
        torch._dynamo.reset()
        self.family, self.counter = family, CompileCounterWithBackend(backend)
        self.plain, self.compiled = (model_of(family, kernels, **changes) for _ in range(2))
        compile_blocks(self.compiled, self.counter)
        self.signatures = set()

    def batches(self, mixing: str, tables, seed: int = 0, label: int = BIO):
        batches = random_step(mixing, seed, label)
        for batch in batches:
            self.signatures.add((plan_of(batch, tables).signature, batch.input_ids.shape))
        return batches

    def gradients(self, batches, tables):
        return tuple(gradients(model, batches, tables) for model in (self.plain, self.compiled))

    def check(self, batches, tables) -> None:
        """Losses and gradients."""
        plain, compiled = self.losses(batches, tables)
        torch.testing.assert_close(compiled, plain, rtol=0, atol=2e-6)
        plain, compiled = self.gradients(batches, tables)
        for name, gradient in plain.items():
            assert torch.equal(gradient == 0, compiled[name] == 0), name
            assert (gradient - compiled[name]).norm() <= 2e-6 * gradient.norm(), name

    def losses(self, batches, tables):
        def loss(model, batch):
            return model(batch.input_ids, batch.targets, plan_of(batch, tables), 1 / batch.step_targets)[0]

        return tuple(torch.stack([loss(model, batch) for batch in batches]) for model in (self.plain, self.compiled))

    def check_graphs(self) -> None:
        most = len(self.signatures) * KINDS_OF_LAYERS[self.family]
        assert len(self.signatures) <= self.counter.frame_count <= most


@pytest.mark.slow
@pytest.mark.parametrize("family", DENSE)
def test_every_strategy_and_mixing(family):
    pair = Pair(family)
    for make in STRATEGIES.values():
        tables = make()
        for seed, mixing in enumerate(MIXINGS):
            pair.check(pair.batches(mixing, tables, seed), tables)
    pair.check_graphs()
    assert pair.counter.frame_count <= PAIRS * KINDS_OF_LAYERS[family]


def test_all_strategies_and_mixings_have_few_signatures():
    pairs = {
        (plan_of(batch, tables).signature, batch.input_ids.shape)
        for tables in (make() for make in STRATEGIES.values())
        for seed, mixing in enumerate(MIXINGS)
        for batch in random_step(mixing, seed)
    }
    assert (len({signature for signature, _ in pairs}), len(pairs)) == (SIGNATURES, PAIRS)


@pytest.mark.parametrize("family", DENSE)
def test_blocks_by_inductor(family):
    pair, tables = Pair(family, "inductor", layers=1), STRATEGIES["sgtm+masked"]()
    batches = pair.batches("sequence", tables)
    for plain, compiled in (pair.losses(batches, tables), pair.gradients(batches, tables)):
        torch.testing.assert_close(compiled, plain, rtol=0, atol=2e-6)
    pair.check_graphs()


@pytest.mark.slow
def test_triton_keeps_its_kernels_where_something_is_masked():
    pair, tables = Pair("gpt_neo", kernels="triton", layers=1), STRATEGIES["sgtm"]()
    for label in (UNLABELED, BIO):
        batches = pair.batches("step", tables, label=label)[:1]
        for plain, compiled in (pair.losses(batches, tables), pair.gradients(batches, tables)):
            torch.testing.assert_close(compiled, plain, rtol=0, atol=2e-6)
    plain, masked = ({str(node.target) for node in graph.graph.nodes} for graph in pair.counter.graphs)
    assert {name for name in plain if "sgtm" in name} == {"sgtm.attention.default"}
    ours = {f"sgtm.{op}.default" for op in ("attention", "linear_in", "linear_out", "activation")}
    assert {name for name in masked if "sgtm" in name} == ours


def test_layers_without_groups_have_a_graph_of_their_own():
    pair, tables = Pair("llama", masked_layers=[0]), STRATEGIES["sgtm"]()
    pair.check(pair.batches("sequence", tables), tables)
    assert pair.counter.frame_count == 2


@pytest.mark.parametrize("family", DENSE)
def test_activation_checkpointing(family):
    pair, tables = Pair(family, activation_checkpointing=True), STRATEGIES["sgtm+masked"]()
    for seed in range(2):
        pair.check(pair.batches("sequence", tables, seed), tables)
    pair.check_graphs()


@pytest.mark.parametrize("family", DENSE)
def test_bf16(family):
    """At most twice the error of the model as it is, against fp32."""
    pair, tables = Pair(family), STRATEGIES["sgtm"]()
    batches = pair.batches("sequence", tables)
    exact = gradients(pair.plain.bfloat16().float(), batches, tables)
    pair.plain.bfloat16()
    pair.compiled.bfloat16()
    plain, compiled = pair.gradients(batches, tables)
    for name, gradient in exact.items():
        assert (compiled[name] - gradient).norm() <= 2 * (plain[name] - gradient).norm(), name
    pair.check_graphs()


def test_two_graphs_serve_every_evaluation():
    pair = Pair("llama")
    every = [removal_tables(SPACE, removed) for removed in SPACE.removals()]
    with torch.no_grad():
        for label in range(4):
            for tables in every:
                plain, compiled = pair.losses(pair.batches("step", tables, label, label), tables)
                torch.testing.assert_close(compiled, plain, rtol=0, atol=2e-6)
    assert pair.counter.frame_count == 2


def test_a_forget_token_changes_no_retain_gradient():
    """Promise 1 in a compiled graph, where inactive heads are computed and multiplied by 0."""
    pair, tables = Pair("gpt_neo"), STRATEGIES["sgtm+masked"]()
    batches = random_step("sequence")
    before = by_key(pair.compiled, gradients(pair.compiled, batches, tables))
    assert_promise(pair.compiled, batches, tables, before, BIO)


def test_what_is_saved_of_a_weight_is_the_weight():
    """Not a view or a copy, which would stay when ZeRO-3 takes the weight away."""
    pair, tables = Pair("llama"), STRATEGIES["sgtm"]()
    weights = {p.untyped_storage().data_ptr(): p for p in pair.compiled.blocks.parameters()}
    saved = []

    def pack(tensor):
        weight = weights.get(tensor.untyped_storage().data_ptr())
        if weight is not None:
            saved.append((tensor.shape, tensor.stride()) == (weight.shape, weight.stride()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients(pair.compiled, random_step("sequence"), tables)
    assert len(saved) >= 6 and all(saved)


def test_the_reference_is_not_compiled():
    with pytest.raises(ValueError, match="compile blocks: the kernel backend reference"):
        check_compiler("cpu", "reference")


def test_a_cpu_without_a_compiler(tmp_path):
    """The error names the key, the reason and the remedy."""
    code = "from sgtm.model.compile import check_compiler; check_compiler('cpu', 'torch')"
    environ = {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ValueError: train.compile blocks: "), last
    assert "No working C++ compiler" in last and "apt install g++" in last and "set train.compile to off" in last


def test_cuda_without_triton(monkeypatch):
    def compiler(*_, **__):
        raise TritonMissing(None)

    monkeypatch.setattr(torch, "compile", compiler)
    message = "train.compile blocks: .*TritonMissing: .*pip install triton.*set train.compile to off"
    with pytest.raises(ValueError, match=message):
        check_compiler("cuda", "triton")
