"""What a step asks of the host, in counts: copies, autograd's nodes, Python calls. Its time is benchmarks/host.py's."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from bare import execute
from torch.utils._python_dispatch import TorchDispatchMode

from sgtm.data.batch import Batch
from sgtm.masking.labels import LabelSpace
from sgtm.masking.partition import build_partition
from sgtm.masking.strategy import build_tables
from sgtm.model.transformer import Transformer
from sgtm_kernels.attention.flex import block_mask
from sgtm_kernels.attention.visible import Visible
from sgtm_kernels.mlp.kernel import activation_forward
from sgtm_kernels.plan import _TABLES, PROJECTIONS

SPACE = LabelSpace(("forget",))
TABLES = {"none": build_tables(SPACE, "none", "free"), "sgtm": build_tables(SPACE, "sgtm", "masked")}
VOCAB, BATCH, SEQ_LEN = 19, 3, 7


class Shape:
    """Section `model` of a config, as far as the model reads it."""

    hidden_size, vocab_size, context, size_per_head = 12, VOCAB, SEQ_LEN, 4
    norm_eps, rope_theta, init_std, head_bias, activation_checkpointing = 1e-5, 1e4, 0.1, False, False
    experts = experts_per_token = shared_experts = 0

    def __init__(self, family: str, layers: int):
        self.family, self.layers, self.tie_embeddings = family, layers, family == "gpt_neo"

    def window_of(self, layer: int) -> int | None:
        return 4 if layer % 2 else None


def model_of(family: str, layers: int, backend: str = "triton", embedding: str | int = "none") -> Transformer:
    sizes = {"layers": layers, "heads": 3, "kv_heads": 3, "neurons": 10, "forget_heads": 1, "forget_neurons": 3}
    return Transformer(Shape(family, layers), build_partition(SPACE, **sizes, embedding=embedding), backend)


def batch_of(labels: tuple[int, ...], lengths: tuple[int, ...], documents=None) -> Batch:
    ids = torch.arange(BATCH * SEQ_LEN).view(BATCH, SEQ_LEN) % VOCAB
    return Batch(ids, ids.roll(-1, 1), labels, lengths, documents, BATCH * SEQ_LEN, frozenset(labels))


BATCHES = {
    "whole sequences": batch_of((2, 0), (7, 14)),
    "labels inside sequences": batch_of((0, 2, 1, 2, 0), (3, 5, 1, 6, 6)),
    "many slices, documents": batch_of((0, 2) * 10, (1,) * 19 + (2,), ((0, 3), (3, 7), (7, 14), (14, 19), (19, 21))),
}
families = pytest.mark.parametrize("family", ["gpt_neo", "llama"])


class Copies(TorchDispatchMode):
    """Copies between devices, and whatever makes the host wait for one."""

    WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")

    def __init__(self):
        super().__init__()
        self.copies, self.waits, self.ours = [], [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function.name().split(".")[0]
        tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
        if name in ("aten::_to_copy", "aten::copy_") and len({t.device for t in tensors}) > 1:
            self.copies.append(name)
        if name in self.WAITS and tensors and tensors[0].device.type != "cpu":
            self.waits.append(name)
        if name.startswith("sgtm::"):
            self.ours.append(name)
        return result


class Calls(TorchDispatchMode):
    """The number of calls of ATen."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.made += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def no_kernels(monkeypatch):
    """Launches do nothing, so that ops run on a device without data too, which stands for a GPU here."""
    monkeypatch.setattr(type(activation_forward), "__getitem__", lambda kernel, grid: lambda *_, **__: None)


def step(model: Transformer, batch: Batch, strategy: str, device: str) -> None:
    ids, targets, plan = batch.on(torch.device(device), TABLES[strategy])
    model(ids, targets, plan, 1.0 / batch.step_targets)[0].backward()
    model.zero_grad(set_to_none=True)


def copies_of(model: Transformer, batch: Batch, strategy: str, monkeypatch) -> int:
    """Copies of a step after the first, which does not wait for one."""
    step(model, batch, strategy, "meta")  # copies the strategy's tables, once
    tables = len(_TABLES)

    def guarded(make):
        def made(*args, device=None, **kwargs):
            assert device is not None and torch.device(device).type == "cpu", "a table travels with every micro-batch"
            return make(*args, device=device, **kwargs)

        return made

    with monkeypatch.context() as patch, Copies() as seen:
        for name in ("tensor", "as_tensor", "asarray"):
            patch.setattr(torch, name, guarded(getattr(torch, name)))
        step(model, batch, strategy, "meta")
    assert (seen.waits, seen.ours, len(_TABLES)) == ([], [], tables)
    return len(seen.copies)


@families
@pytest.mark.parametrize("embedding", ["none", "full", 2])
@pytest.mark.parametrize("strategy", TABLES)
@pytest.mark.parametrize("name", BATCHES)
def test_a_micro_batch_is_one_copy_and_no_wait(name, strategy, embedding, family, no_kernels, monkeypatch):
    model = model_of(family, 2, embedding=embedding).to("meta")
    assert copies_of(model, BATCHES[name], strategy, monkeypatch) == 1


@families
def test_rectangles_take_one_copy_more_for_each_part(family, no_kernels, monkeypatch):
    monkeypatch.setenv("SGTM_LINEAR", "rectangles")
    model = model_of(family, 2).to("meta")
    parts = [part for part in PROJECTIONS if len(set(TABLES["sgtm"].update[part])) > 1]
    copies = copies_of(model, BATCHES["many slices, documents"], "sgtm", monkeypatch)
    assert 1 < copies <= 1 + len(parts)
    assert copies_of(model, BATCHES["whole sequences"], "sgtm", monkeypatch) == 1


def test_public_attention_copies_nothing():
    """What it takes of documents, for all sequences and for some."""
    batch, device = BATCHES["many slices, documents"], torch.device("meta")
    _, _, plan = batch.on(device, TABLES["sgtm"])
    with Copies() as seen:
        for sequences in ((0, 3), (1, 3)):
            visible = Visible(plan, 4, *sequences)
            edges, longest = visible.edges(device)
            mask = block_mask(visible, device)
            assert (len(edges), longest) == (len(visible.documents) + 1, 7) and mask.kv_indices.device == device
    assert (seen.copies, seen.waits) == ([], [])


def test_edges_of_documents():
    plan = BATCHES["many slices, documents"].plan(TABLES["sgtm"])
    for sequences, expected in (((0, 3), [0, 3, 7, 14, 19, 21]), ((2, 3), [0, 5, 7]), ((0, 2), [0, 3, 7, 14])):
        edges, _ = Visible(plan, None, *sequences).edges(torch.device("cpu"))
        assert edges.tolist() == expected and edges.dtype == torch.int32


def calls_of(function: Callable[[], object]) -> Counter[str]:
    """Calls of this project's Python functions, by name."""
    calls: Counter[str] = Counter()

    def profile(frame, event, _):
        if event == "call" and frame.f_globals.get("__name__", "").split(".")[0] in ("sgtm", "sgtm_kernels"):
            calls[frame.f_code.co_name] += 1

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def per_layer(family: str, batch: Batch, strategy: str, backend: str = "triton") -> tuple[Counter[str], Counter[str]]:
    """Calls of a step of one pair of layers (whole and windowed), and those that each further pair adds."""
    counts = []
    for layers in (2, 4):
        model = model_of(family, layers, backend)
        step(model, batch, strategy, "cpu")
        with torch.autograd.set_multithreading_enabled(False):
            counts.append(calls_of(lambda: step(model, batch, strategy, "cpu")))  # noqa: B023
    return counts[0], counts[1] - counts[0]


# Of our Python functions per layer, forward and backward: with nothing masked; with masks.
CALLS = {"none": 188, "sgtm": 214}
# In the backend `torch`, whole sequences: calls of ATen per layer, and of our Python functions.
OF_PYTORCH = {
    ("gpt_neo", "none"): (97, 146),
    ("gpt_neo", "sgtm"): (156, 168),
    ("llama", "none"): (165, 184),
    ("llama", "sgtm"): (197, 180),
}


@families
@pytest.mark.parametrize("strategy", TABLES)
@pytest.mark.parametrize("name", BATCHES)
def test_what_follows_from_the_plan_is_computed_once(name, strategy, family, no_kernels):
    first, further = per_layer(family, BATCHES[name], strategy)
    of_plan = ("_updaters", "_rows", "_mask", "masks", "_share_and_length", "factors", "token_weights", "live", "spans")
    assert {call: further[call] for call in of_plan if further[call]} == {}
    assert sum(further.values()) / 2 <= CALLS[strategy]
    assert sum(first.values()) <= 6 * CALLS[strategy]


@families
@pytest.mark.parametrize("strategy", TABLES)
def test_a_layer_of_pytorch_ops_is_so_many_calls(strategy, family):
    batch, counts = BATCHES["whole sequences"], []
    for layers in (2, 4):
        model = model_of(family, layers, "torch")
        step(model, batch, strategy, "cpu")
        with torch.autograd.set_multithreading_enabled(False), Calls() as seen:
            step(model, batch, strategy, "cpu")
        counts.append(seen.made)
    _, further = per_layer(family, batch, strategy, "torch")
    aten, ours = OF_PYTORCH[family, strategy]
    assert (counts[1] - counts[0]) / 2 <= aten
    assert sum(further.values()) / 2 <= ours


@families
def test_a_layer_has_one_node_for_each_op(family, no_kernels):
    """Nodes of autograd: two norms, one of them with a sum of the residual stream, the other sum, four projections,
    attention and activation, and one for each parameter. GPT-Neo's activation is one with its projection."""
    counts = []
    for layers in (2, 3):
        ids, targets, plan = BATCHES["whole sequences"].on(torch.device("cpu"), TABLES["sgtm"])
        loss, _ = model_of(family, layers)(ids, targets, plan, 1.0)
        counts.append(len(nodes_of(loss.grad_fn)))
    model = model_of(family, 1)
    assert counts[1] - counts[0] == {"gpt_neo": 8, "llama": 9}[family] + len(list(model.blocks[0].parameters()))


def nodes_of(root) -> set:
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return seen


@pytest.mark.parametrize(
    ("script", "arguments", "lines"),
    [
        ("host", ["--family", "gpt_neo", "--rounds", "1"], 5),
        ("host_optimizer", ["--shape", "tiny", "--rounds", "1"], 8),
    ],
)
def test_the_benchmarks_of_the_host_run(script, arguments, lines):
    done = execute([sys.executable, f"benchmarks/{script}.py", *arguments], dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == lines
