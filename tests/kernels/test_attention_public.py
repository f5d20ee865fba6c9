"""Attention of `torch` through FlexAttention and flash-attn: what they are handed, what comes out, and which is taken.

flash-attn runs on CUDA alone: here a stand-in of the same signatures takes its place, and refuses what it would.
FlexAttention runs on the CPU as a traced graph, its check that there is no backward pass there taken out.
"""

import math
import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from sgtm_kernels.attention import HeadLayout, attention, flex, public
from sgtm_kernels.attention.public import Facts, choose
from sgtm_kernels.attention.reference import visible_keys
from sgtm_kernels.attention.visible import Visible
from sgtm_kernels.plan import MaskPlan
from sgtm_kernels.testing import (
    BINARY,
    FLOATS,
    assert_accurate,
    assert_same_bits,
    forward_backward,
    random_like,
    random_plan,
    random_tables,
    token_mask,
)

pytestmark = pytest.mark.cpu

SCALE = 0.7
BF16, FP32 = torch.bfloat16, torch.float32
CUDA = Facts("cuda", BF16, 64)
HEADS = HeadLayout((4, 0, 2), (2, 0, 2), 8)
by_library = pytest.mark.parametrize("library", ["flex", "flash_attn"])


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Both libraries as if the device were CUDA."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(public, "facts_of", lambda device, dtype, head_dim: CUDA)
    stand_in = ModuleType("flash_attn")
    stand_in.calls = []
    stand_in.flash_attn_func, stand_in.flash_attn_varlen_func = _flash_attn(stand_in.calls)
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)


def _flash_attn(calls: list[dict]):
    """The two functions of flash-attn 2.8, in plain torch, one document and one head at a time."""

    def attend(q, k, v, scale, window):
        """q [S, heads, d], k and v [S, kv_heads, d]."""
        left, right = (math.inf if n < 0 else n for n in window)
        position = torch.arange(len(q))
        ahead = position - position[:, None]
        hidden = (ahead > min(right, 0)) | (-ahead > left)
        heads = []
        for head in range(q.shape[1]):
            kv_head = head * k.shape[1] // q.shape[1]
            scores = (q[:, head] @ k[:, kv_head].t() * scale).masked_fill(hidden, -math.inf)
            heads.append(scores.softmax(-1) @ v[:, kv_head])
        return torch.stack(heads, 1)

    def check(q, k, v, dimensions, dropout_p, causal, others):
        assert q.dim() == k.dim() == v.dim() == dimensions and k.shape == v.shape
        assert q.shape[-1] == k.shape[-1] and q.shape[-2] % k.shape[-2] == 0
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        assert dropout_p == 0 and causal and not any(others)

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        check(q, k, v, 4, dropout_p, causal, (softcap, alibi_slopes, return_attn_probs))
        calls.append({"window": window_size, "deterministic": deterministic, "shape": (q.shape, k.shape)})
        return torch.stack([attend(*one, softmax_scale, window_size) for one in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        check(q, k, v, 3, dropout_p, causal, (softcap, alibi_slopes, return_attn_probs, block_table))
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and cu_seqlens_q.device == q.device
        assert type(max_seqlen_q) is type(max_seqlen_k) is int  # a tensor would be read from the device
        edges = cu_seqlens_q.tolist()
        assert edges == cu_seqlens_k.tolist() and (edges[0], edges[-1]) == (0, len(q))
        assert max_seqlen_q == max_seqlen_k == max(end - start for start, end in pairwise(edges))
        calls.append({"window": window_size, "deterministic": deterministic, "edges": cu_seqlens_q})
        parts = [attend(*(x[s:e] for x in (q, k, v)), softmax_scale, window_size) for s, e in pairwise(edges)]
        return torch.cat(parts)

    return flash_attn_func, flash_attn_varlen_func


def op(heads: HeadLayout, plan: MaskPlan, window: int | None, backend: str = "torch", rotary=None):
    return lambda qkv: attention(qkv, heads, plan, scale=SCALE, window=window, rotary=rotary, backend=backend)


def data(heads: HeadLayout, plan: MaskPlan, dtype=torch.float64) -> torch.Tensor:
    columns = (sum(heads.heads) + 2 * sum(heads.kv_heads)) * heads.head_dim
    return random_like(torch.empty(plan.batch, plan.seq_len, columns, dtype=FP32), 1).to(dtype)


@by_library
@pytest.mark.parametrize(
    ("layout", "heads", "batch", "seq_len", "window", "documents", "turned"),
    [
        ("uniform", HeadLayout((3,), (3,), 8), 2, 1, None, False, False),
        ("uniform", HeadLayout((2,), (1,), 24), 1, 300, 140, False, False),
        ("sorted", HEADS, 3, 63, 16, False, True),
        ("sorted", HEADS, 4, 130, None, True, False),
        ("unsorted", HEADS, 10, 13, 5, True, False),
        ("ragged", HEADS, 2, 130, 1, True, True),
        ("tokens", HEADS, 3, 63, 20, True, False),
        ("tokens", HEADS, 1, 130, 129, False, False),
    ],
)
def test_they_are_as_accurate_as_the_reference(
    layout, heads, batch, seq_len, window, documents, turned, library, monkeypatch
):
    """Through the whole op, its masks included, forward and backward."""
    monkeypatch.setenv("SGTM_ATTENTION", library)
    plan = random_plan(3, random_tables(4, FLOATS), layout, batch, seq_len, documents)
    angles = torch.arange(seq_len)[:, None] * 0.1 ** torch.arange(heads.head_dim // 2).repeat(2)
    rotary = (angles.cos(), angles.sin()) if turned else None
    exact = forward_backward(op(heads, plan, window, "reference", rotary), data(heads, plan))
    theirs = forward_backward(op(heads, plan, window, "reference", rotary), data(heads, plan, FP32))
    ours = forward_backward(op(heads, plan, window, rotary=rotary), data(heads, plan, FP32))
    for name, *values in zip(("y", "dqkv"), ours, theirs, exact, strict=True):
        assert_accurate(*values, name=name)


@by_library
@pytest.mark.parametrize("layout", ["sorted", "tokens"])
def test_binary_masks_and_documents_are_exact(layout, library, monkeypatch):
    """Other content in the documents of one label leaves every bit of the others; NaN of what is inactive stays out."""
    monkeypatch.setenv("SGTM_ATTENTION", library)
    plan = random_plan(9, random_tables(10, BINARY), layout, 4, 40, documents=True)
    x = data(HEADS, plan, FP32)
    before = forward_backward(op(HEADS, plan, 16), x)
    for label in plan.present:
        mine = token_mask(plan, [label])[..., None]
        after = forward_backward(op(HEADS, plan, 16), x.where(~mine, 1 - 3 * x))
        for old, new in zip(before, after, strict=True):
            assert_same_bits(new.where(~mine, 0.0), old.where(~mine, 0.0))
    if layout == "sorted":
        width = 8 * HEADS.head_dim
        idle = token_mask(plan, [label for label, row in enumerate(plan.tables.active) if row[0] == 0])
        assert bool(idle.any())
        x[..., :width].masked_fill_(idle[..., None], torch.nan)
        out, dx = forward_backward(op(HEADS, plan, 16), x)
        assert bool(out.isfinite().all()) and bool((dx[x.isnan()] == 0).all())


def test_what_flash_attn_is_handed(monkeypatch):
    """One launch for all documents of a slice, of all groups where nothing is masked; edges made once; every call
    deterministic."""
    monkeypatch.setenv("SGTM_ATTENTION", "flash_attn")
    calls = sys.modules["flash_attn"].calls
    heads, free = HeadLayout((4, 2), (2, 1), 8), random_tables(0, (1.0,), groups=2)
    whole = MaskPlan.uniform(free, 0, 3, 10)
    x = data(heads, whole, FP32)
    op(heads, whole, None)(x), op(heads, whole, 10)(x), op(heads, whole, 4)(x)
    assert [call["window"] for call in calls] == [(-1, -1)] * 2 + [(3, 0)]
    assert calls[0]["shape"] == ((3, 10, 6, 8), (3, 10, 3, 8))
    calls.clear()
    cut = MaskPlan(free, whole.label_runs, 3, 10, ((0, 3), (3, 10), (10, 20), (20, 21), (21, 30)))
    op(heads, cut, 4)(x), op(heads, cut, 4)(x)
    assert [call["edges"].tolist() for call in calls] == [[0, 3, 10, 20, 21, 30]] * 2
    assert calls[0]["edges"] is calls[1]["edges"] and calls[0]["window"] == (3, 0)
    calls.clear()
    op(heads, MaskPlan(free, whole.label_runs, 3, 10, ((0, 10), (10, 20), (20, 30))), None)(x)
    assert all("edges" not in call for call in calls)  # every sequence is one document: nothing to cut
    assert all(call["deterministic"] is True for call in calls)


@pytest.mark.parametrize("seq_len", [1, 63, 128, 130, 256, 600])
@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
@pytest.mark.parametrize("documents", [False, True])
def test_block_masks_are_those_of_torch(documents, window, seq_len):
    """Bit for bit what create_block_mask makes of the mask of all pairs, which is that of the reference."""
    plan = random_plan(5, random_tables(6), "ragged", 4, seq_len, documents and seq_len > 1)
    seen = visible_keys(plan, window, "cpu")
    ours = flex.block_mask(Visible(plan, window, 1, 4), torch.device("cpu"))
    size = (3, 1, seq_len, seq_len)
    assert_equal(create_mask(ours.mask_mod, *size, device="cpu")[:, 0], seen[1:])
    theirs = create_block_mask(lambda b, h, q, k: seen[b + 1, q, k], *size, device="cpu", BLOCK_SIZE=flex.BLOCK)
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE and ours.seq_lengths == theirs.seq_lengths
    for rows, listed in (("kv_num_blocks", "kv_indices"), ("q_num_blocks", "q_indices")):
        for prefix in ("", "full_"):
            names = prefix + rows, prefix + listed
            count, which = (getattr(ours, name) for name in names)
            assert_equal(count, getattr(theirs, names[0]))
            assert_equal(which, getattr(theirs, names[1]))
            assert count.dtype == which.dtype == torch.int32 and which.is_contiguous()


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape and bool((actual == expected).all())


def test_block_masks_are_made_once_for_every_layer():
    plan = random_plan(5, random_tables(6), "sorted", 4, 40, documents=True)
    device = torch.device("cpu")
    one = flex.block_mask(Visible(plan, 8), device)
    assert flex.block_mask(Visible(plan, 8, 0, 4), device) is one
    others = [flex.block_mask(visible, device) for visible in (Visible(plan), Visible(plan, 9), Visible(plan, 8, 0, 3))]
    assert len({id(mask) for mask in (one, *others)}) == 4


def test_flex_is_not_compiled_for_every_batch(monkeypatch):
    """Once for several sequences and once for one, for each number of heads: neither window nor documents count."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(flex.whole_graph, backend=counter, fullgraph=True)
    monkeypatch.setattr(flex, "compiled", lambda backend: compiled)

    def graphs(batch: int, window: int | None, documents: bool, heads: int = 2) -> int:
        plan = random_plan(batch, random_tables(1), "sorted", batch, 130, documents)
        q = random_like(torch.empty(batch, heads, 130, 8), 0).requires_grad_()
        flex.attend(q, q, q, SCALE, Visible(plan, window))
        return counter.frame_count

    assert graphs(2, None, True) == 1
    for batch, window, documents in ((3, 7, True), (5, None, False), (4, 100, True), (2, 1, False)):
        assert graphs(batch, window, documents) == 1
    assert [graphs(1, window, documents) for window, documents in ((None, True), (9, False), (30, True))] == [2] * 3
    assert [graphs(batch, 9, True, heads=3) for batch in (2, 6, 3)] == [3] * 3


@pytest.mark.parametrize(
    ("facts", "whole", "want"),
    [
        (CUDA, True, "sdpa"),
        (CUDA, False, "flash_attn"),
        (CUDA._replace(dtype=torch.float16), False, "flash_attn"),
        (CUDA._replace(head_dim=8), False, "flash_attn"),
        (CUDA._replace(head_dim=512), False, "flex"),
        (CUDA._replace(flash_attn="not installed"), False, "flex"),
        (CUDA._replace(flash_attn="not installed"), True, "sdpa"),
        (CUDA._replace(flash_attn="not installed", head_dim=8), False, "sdpa"),
        (CUDA._replace(flash_attn="not installed", flex="no Triton"), False, "sdpa"),
        (CUDA._replace(flex="no Triton"), False, "flash_attn"),
        (CUDA._replace(dtype=FP32), False, "sdpa"),
        (CUDA._replace(dtype=torch.float64), False, "sdpa"),
        (Facts("cpu", BF16, 64), False, "sdpa"),
        (Facts("cpu", BF16, 64), True, "sdpa"),
    ],
)
def test_what_is_taken_by_itself(facts, whole, want, monkeypatch):
    monkeypatch.delenv("SGTM_ATTENTION", raising=False)
    assert choose(facts, whole) == want


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("library", "facts", "problem"),
    [
        ("sdpa", CUDA, None),
        ("sdpa", Facts("cpu", torch.float64, 4), None),
        ("flash_attn", CUDA, None),
        ("flash_attn", CUDA._replace(flex="no Triton"), None),
        ("flash_attn", CUDA._replace(flash_attn="flash_attn does not import"), "flash_attn does not import"),
        ("flash_attn", CUDA._replace(dtype=FP32), "it takes fp16 and bf16, not torch.float32"),
        ("flash_attn", CUDA._replace(head_dim=257), "it takes heads of up to 256, not 257"),
        ("flash_attn", Facts("cpu", BF16, 64), "on the device 'cpu'"),
        ("flex", CUDA, None),
        ("flex", CUDA._replace(dtype=FP32), None),
        ("flex", CUDA._replace(dtype=torch.float64), "not torch.float64"),
        ("flex", CUDA._replace(head_dim=15), "it takes heads of 16 and more, not 15"),
        ("flex", CUDA._replace(flex="Triton is not installed"), "Triton is not installed"),
        ("flex", Facts("cpu", FP32, 64), "on the device 'cpu'"),
    ],
)
def test_what_is_named_is_taken_or_refused(library, facts, problem, whole, monkeypatch):
    monkeypatch.setenv("SGTM_ATTENTION", library)
    if problem is None:
        assert choose(facts, whole) == library
    else:
        with pytest.raises(ValueError, match=f"^SGTM_ATTENTION={library} was requested, but .*{problem}"):
            choose(facts, whole)


def test_an_unknown_name_is_an_error(monkeypatch):
    monkeypatch.setenv("SGTM_ATTENTION", "flash")
    with pytest.raises(ValueError, match=r"SGTM_ATTENTION is 'flash'; it takes sdpa, flash_attn or flex"):
        choose(CUDA, True)


def test_the_facts_of_this_machine(monkeypatch):
    """On a CPU nothing is imported to decide; a flash-attn that does not import is a problem and not a crash."""
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it raises
    monkeypatch.setenv("SGTM_ATTENTION", "flex")
    plan = random_plan(1, random_tables(2), "sorted", 4, 20, documents=True)
    with pytest.raises(ValueError, match="SGTM_ATTENTION=flex was requested, but it trains on CUDA alone"):
        op(HEADS, plan, 4)(data(HEADS, plan))
    public._flash_attn_problem.cache_clear()
    assert public._flash_attn_problem().startswith("flash_attn does not import (import of flash_attn halted")
    public._flash_attn_problem.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", BuiltForAnotherTorch("flash_attn"))
    assert public._flash_attn_problem().startswith("flash_attn does not import (undefined symbol)")
    public._flash_attn_problem.cache_clear()


class BuiltForAnotherTorch(ModuleType):
    def __getattr__(self, name: str):
        raise OSError("undefined symbol")


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["", "flex", "flash_attn"])  # unset first: what a user gets
@pytest.mark.parametrize(
    ("layout", "window", "documents"), [("sorted", None, False), ("sorted", 100, False), ("tokens", None, True)]
)
def test_on_a_gpu_twice_the_same_bits_and_as_accurate_as_torch(layout, window, documents, library, monkeypatch):
    """Under `torch.use_deterministic_algorithms(True)`, as in training: `forward_backward` sets it."""
    monkeypatch.undo()
    if library == "flash_attn" and (problem := public._flash_attn_problem()):
        pytest.skip(problem)  # optional
    monkeypatch.setenv("SGTM_ATTENTION", library)
    heads = HeadLayout((4, 2), (2, 1), 32)
    plan = random_plan(3, random_tables(4, FLOATS, groups=2), layout, 6, 300, documents)
    x = data(heads, plan, BF16)
    exact = forward_backward(op(heads, plan, window, "reference"), x.double())
    theirs = forward_backward(op(heads, plan, window, "reference"), x)
    ours, again = (forward_backward(op(heads, plan, window), x.cuda()) for _ in range(2))
    for name, *values, more in zip(("y", "dqkv"), ours, theirs, exact, again, strict=True):
        assert_same_bits(values[0], more, name)
        assert_accurate(values[0].cpu(), *values[1:], name=name)
