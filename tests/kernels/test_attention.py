"""Causal attention by groups of heads: `active` and `route`, documents, windows, grouped queries, rotary positions."""

import math
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from sgtm_kernels.attention import HeadLayout, attention, blocks, kernel
from sgtm_kernels.attention.op import rotate
from sgtm_kernels.attention.reference import visible_keys
from sgtm_kernels.dispatch import BACKENDS
from sgtm_kernels.mlp.reference import mask_groups
from sgtm_kernels.plan import MaskPlan, merge_label_runs
from sgtm_kernels.testing import (
    BINARY,
    EXACT,
    FLOATS,
    LAYOUTS,
    assert_accurate,
    assert_same_bits,
    backends_and_dtypes,
    forward_backward,
    random_like,
    random_plan,
    random_tables,
    token_mask,
)

# Three groups of unequal size; grouped queries; a domain that has neurons but no head.
PLAIN = HeadLayout((3, 1, 2), (3, 1, 2), 4)
GROUPED = HeadLayout((4, 2, 6), (2, 1, 3), 4)
NO_HEADS = HeadLayout((3, 0, 2), (3, 0, 2), 4)
FEW = HeadLayout((1, 0, 1), (1, 0, 1), 8)
SCALE = 0.7

by_layout = pytest.mark.parametrize("layout", LAYOUTS)
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_exact = pytest.mark.parametrize("backend", EXACT)
# Of the four cases of the kernels two, which the interpreter has time for.
by_backend_dtype_and_window = pytest.mark.parametrize(
    ("backend", "dtype", "window"),
    [
        (backend, dtype, window)
        for backend, dtype in backends_and_dtypes()
        for window in (None, 4)
        if backend != "triton" or (dtype is torch.float32) == (window is None)
    ],
)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """In bf16 `torch` takes blocks of 4 queries; `triton` takes small blocks."""
    monkeypatch.setattr(blocks, "ROWS", 4)
    monkeypatch.setattr(kernel, "tile", lambda launched, width, like: TILES[launched])


TILES = {
    kernel.attention_forward: kernel.Tile(16, 32, 4, 1),
    kernel.attention_backward_queries: kernel.Tile(32, 16, 4, 1),
    kernel.attention_backward_keys: kernel.Tile(16, 32, 4, 1),
}


def size(backend: str) -> tuple[HeadLayout, int, int]:
    """Heads, batch and sequence length: few programs for the interpreter, more than one block in each of them."""
    return (FEW, 4, 20) if backend == "triton" else (GROUPED, 10, 13)


def columns(heads: HeadLayout) -> int:
    return (sum(heads.heads) + 2 * sum(heads.kv_heads)) * heads.head_dim


def data(heads: HeadLayout, batch: int, seq_len: int, dtype=torch.float64) -> torch.Tensor:
    return random_like(torch.empty(batch, seq_len, columns(heads), dtype=torch.bfloat16), 1).to(dtype)


def op(heads: HeadLayout, plan: MaskPlan, backend: str, window=None, rotary=None):
    return lambda qkv: attention(qkv, heads, plan, scale=SCALE, window=window, rotary=rotary, backend=backend)


def angles(seq_len: int, head_dim: int) -> torch.Tensor:
    frequencies = 100.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return torch.arange(seq_len, dtype=torch.float64)[:, None] * frequencies


def rotary_tables(seq_len: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    both = angles(seq_len, head_dim).repeat(1, 2)
    return both.cos(), both.sin()


def by_hand(qkv, heads: HeadLayout, plan: MaskPlan, window, rotary: bool, backwards: bool = False) -> torch.Tensor:
    """Query by query, head by head; `backwards` builds the function whose gradient is that of the masked op."""
    label = [run.label for run in plan.label_runs for _ in range(run.start, run.end)]
    document = list(range(plan.tokens))
    for i, (start, end) in enumerate(
        plan.documents or [(b * plan.seq_len, (b + 1) * plan.seq_len) for b in range(plan.batch)]
    ):
        document[start:end] = [i] * (end - start)
    d, outputs = heads.head_dim, []
    turn = torch.polar(torch.ones(()).double(), angles(plan.seq_len, d)) if rotary else None

    def turned(x, position):
        if turn is None:
            return x
        z = torch.complex(x[: d // 2], x[d // 2 :]) * turn[position]
        return torch.cat([z.real, z.imag])

    for b in range(plan.batch):
        for s in range(plan.seq_len):
            token, offset, row = b * plan.seq_len + s, 0, []
            seen = [
                j
                for j in range(s + 1)
                if document[b * plan.seq_len + j] == document[token] and (window is None or j > s - window)
            ]
            for group, (n_q, n_kv) in enumerate(zip(heads.heads, heads.kv_heads, strict=True)):
                active, route = plan.tables.active[label[token]][group], plan.tables.route[label[token]][group]
                for h in range(n_q):
                    q_at, kv = offset + h * d, h * n_kv // n_q
                    k_at, v_at = offset + (n_q + kv) * d, offset + (n_q + n_kv + kv) * d
                    q = turned(qkv[b, s, q_at : q_at + d], s)
                    keys = torch.stack([turned(qkv[b, j, k_at : k_at + d], j) for j in seen])
                    values = torch.stack([qkv[b, j, v_at : v_at + d] for j in seen])
                    weights = torch.softmax(SCALE * keys @ q, 0)
                    row.append((active * route if backwards else active) * (weights @ values))
                offset += (n_q + 2 * n_kv) * d
            outputs.append(torch.cat(row))
    return torch.stack(outputs).view(plan.batch, plan.seq_len, -1)


@by_exact
@pytest.mark.parametrize(
    ("layout", "heads", "window", "rotary", "documents"),
    [
        ("sorted", PLAIN, None, False, False),
        ("sorted", PLAIN, 3, False, True),
        ("ragged", PLAIN, 1, True, False),
        ("tokens", PLAIN, 4, False, True),
        ("unsorted", GROUPED, None, True, True),
        ("sorted", GROUPED, 2, True, False),
        ("tokens", GROUPED, 7, True, True),
        ("ragged", GROUPED, 8, False, False),
        ("uniform", NO_HEADS, 5, False, True),
        ("tokens", NO_HEADS, None, True, False),
    ],
)
def test_by_hand_in_fp64(layout, heads, window, rotary, documents, backend):
    batch, seq_len = (9, 3) if layout == "unsorted" else (4, 7)
    plan = random_plan(1, random_tables(2), layout, batch, seq_len, documents)
    x = data(heads, batch, seq_len)
    tables = rotary_tables(seq_len, heads.head_dim) if rotary else None
    out, dx = forward_backward(op(heads, plan, backend, window, tables), x)
    torch.testing.assert_close(out, by_hand(x, heads, plan, window, rotary), rtol=1e-11, atol=1e-12)
    _, want = forward_backward(lambda x: by_hand(x, heads, plan, window, rotary, backwards=True), x)
    torch.testing.assert_close(dx, want, rtol=1e-11, atol=1e-12)


def assert_as_accurate_as_torch(heads, plan, backend, window, rotary, dtype):
    """`backend` against torch's own attention with all masks as one."""

    def plain(qkv):
        outputs = []
        for q, k, v in filter(lambda group: group[0].shape[1], heads.split(qkv)):
            mask = visible_keys(plan, window, qkv.device)[:, None]
            if rotary is not None:
                q, k = rotate(q, rotary), rotate(k, rotary)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE, enable_gqa=True)
            outputs.append(out.transpose(1, 2).flatten(2))
        bounds = (0, *accumulate(n * heads.head_dim for n in heads.heads))
        return mask_groups(torch.cat(outputs, -1), plan, bounds)

    x = data(heads, plan.batch, plan.seq_len)
    exact = forward_backward(op(heads, plan, "reference", window, rotary), x)
    theirs = forward_backward(plain, x.to(dtype))
    ours = forward_backward(op(heads, plan, backend, window, rotary), x.to(dtype))
    for name, *values in zip(("y", "dqkv"), ours, theirs, exact, strict=True):
        assert_accurate(*values, name=name)


@by_dtype
@by_layout
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("batch", "seq_len", "window"), [(1, 1, None), (9, 7, 3), (9, 7, 7), (9, 21, 30), (10, 100, None), (10, 100, 16)]
)
def test_runs_are_as_accurate_as_torch(batch, seq_len, window, documents, layout, dtype):
    heads = GROUPED if seq_len % 3 else PLAIN
    plan = random_plan(3, random_tables(4), layout, batch, seq_len, documents and seq_len > 1)
    assert_as_accurate_as_torch(heads, plan, "torch", window, rotary_tables(seq_len, heads.head_dim), dtype)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(("triton",)))
@pytest.mark.parametrize(
    ("layout", "values", "heads", "batch", "seq_len", "window", "rotary", "documents"),
    [
        ("uniform", (1.0,), HeadLayout((1,), (1,), 8), 1, 1, None, True, False),
        ("uniform", (1.0,), HeadLayout((1,), (1,), 24), 1, 130, None, False, False),
        ("tokens", BINARY, HeadLayout((1, 1), (1, 1), 24), 1, 130, 40, True, True),
        ("tokens", BINARY, HeadLayout((2, 4), (2, 1), 8), 1, 63, None, False, False),
        ("tokens", FLOATS, HeadLayout((2, 4), (1, 2), 8), 1, 63, None, True, True),
        ("ragged", FLOATS, HeadLayout((0, 2, 1), (0, 1, 1), 32), 2, 63, 16, False, False),
        ("ragged", FLOATS, HeadLayout((1, 0), (1, 0), 64), 2, 63, 1, False, True),
        ("sorted", BINARY, HeadLayout((1, 1), (1, 1), 96), 3, 37, 33, True, True),
        ("unsorted", FLOATS, HeadLayout((1, 1), (1, 1), 128), 4, 17, None, False, False),
    ],
)
def test_the_kernels_are_as_accurate_as_torch(
    layout, values, heads, batch, seq_len, window, rotary, documents, backend, dtype
):
    plan = random_plan(3, random_tables(4, values, groups=len(heads.heads)), layout, batch, seq_len, documents)
    tables = rotary_tables(seq_len, heads.head_dim) if rotary else None
    assert_as_accurate_as_torch(heads, plan, backend, window, tables, dtype)


@pytest.mark.parametrize("heads", [HeadLayout((2, 0, 1), (1, 0, 1), 12), HeadLayout((2,), (2,), 8)])
def test_q_and_k_are_turned_in_place_where_that_is_allowed(heads):
    """With the bits of the copy; v, and without permission everything, stays as it is."""
    plan, dtype = random_plan(3, random_tables(4, groups=len(heads.heads)), "ragged", 2, 9), torch.float32
    qkv, rotary, results = data(heads, 2, 9, dtype), rotary_tables(9, heads.head_dim), []
    for overwrite in (False, True):
        x = qkv.clone().requires_grad_()
        own = x * 1
        y = attention(own, heads, plan, scale=SCALE, rotary=rotary, overwrite=overwrite, backend="triton")
        results.append((y, *torch.autograd.grad(y, x, random_like(y, 5))))
        for (q, k, v), was in zip(heads.split(own), heads.split(qkv), strict=True):
            for now, before, changes in zip((q, k, v), was, (overwrite, overwrite, False), strict=True):
                assert torch.equal(now[:, :, 1:], before[:, :, 1:]) != (changes and now.numel() > 0)
    for mine, wanted in zip(*results, strict=True):
        assert_same_bits(mine, wanted)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(("triton",)))
def test_the_kernels_in_their_own_block_sizes(backend, dtype, monkeypatch):
    monkeypatch.undo()
    plan = random_plan(3, random_tables(4), "tokens", 1, 300, documents=True)
    assert_as_accurate_as_torch(HeadLayout((1, 1, 0), (1, 1, 0), 32), plan, backend, 70, None, dtype)


@by_backend_dtype_and_window
@by_layout
def test_binary_masks_are_exact(window, layout, dtype, backend):
    """Inactive or not, and stopped or not: value and gradient are 0 or, bit for bit, the unmasked ones."""
    heads, batch, seq_len = size(backend)
    tables = random_tables(5, BINARY)
    plan = random_plan(6, tables, layout, batch, seq_len, documents=True)
    free = MaskPlan(random_tables(7, (1.0,)), plan.label_runs, batch, seq_len, plan.documents)
    x = data(heads, batch, seq_len, dtype)
    results = [forward_backward(op(heads, p, backend, window), x) for p in (plan, free)]
    widths = [n * heads.head_dim for n in heads.heads]
    in_widths = [(q + 2 * kv) * heads.head_dim for q, kv in zip(heads.heads, heads.kv_heads, strict=True)]
    (y, d), (y_free, d_free) = ((out.split(widths, -1), dx.split(in_widths, -1)) for out, dx in results)
    for label in {run.label for run in plan.label_runs}:
        mine = token_mask(plan, [label])
        for group in range(3):
            on, passes = tables.active[label][group], tables.route[label][group]
            assert_same_bits(y[group][mine], y_free[group][mine] * on, "y")
            assert_same_bits(d[group][mine], d_free[group][mine] * on * passes, "dqkv")


@by_backend_dtype_and_window
@by_layout
def test_documents_do_not_see_one_another(window, layout, dtype, backend):
    """Other content in the documents of one label leaves every bit of the others, forward and backward."""
    heads, batch, seq_len = size(backend)
    plan = random_plan(9, random_tables(10), layout, batch, seq_len, documents=True)
    x = data(heads, batch, seq_len, dtype)
    before = forward_backward(op(heads, plan, backend, window), x)
    for label in sorted({run.label for run in plan.label_runs})[: 1 if backend == "triton" else None]:
        mine = token_mask(plan, [label])[..., None]
        after = forward_backward(op(heads, plan, backend, window), x.where(~mine, 1 - 3 * x))
        for old, new in zip(before, after, strict=True):
            assert_same_bits(new.where(~mine, 0.0), old.where(~mine, 0.0))


@by_backend
def test_a_layer_without_groups_ignores_the_tables(backend):
    heads = HeadLayout((6,), (3,), 4)
    plans = [random_plan(11, random_tables(12, (value,)), "tokens", 6, 9) for value in (0.0, 1.0)]
    results = [forward_backward(op(heads, plan, backend, 4), data(heads, 6, 9, torch.float32)) for plan in plans]
    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours, theirs)


@by_backend
@pytest.mark.parametrize("layout", ["sorted", "tokens"])
@pytest.mark.parametrize("table", ["active", "route"])
def test_all_stopped_has_a_gradient_of_zero(table, layout, backend):
    """Never None: under ZeRO a gradient that is missing on some ranks only is a hang."""
    ones, zeros = (((value,) * 3,) * 4 for value in (1.0, 0.0))
    free = random_tables(0, (1.0,))
    masks = {"active": ones, "route": ones, table: zeros}
    tables = type(free)(free.labels, free.groups, masks["active"], masks["route"], free.update, free.update_joint)
    heads, batch, seq_len = size(backend)
    plan = random_plan(12, tables, layout, batch, seq_len)
    _, dx = forward_backward(op(heads, plan, backend), data(heads, batch, seq_len, torch.float32))
    assert dx is not None and bool((dx == 0).all())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("documents", [False, True])
def test_an_inactive_group_of_a_run_is_not_computed(documents, backend):
    """Not even NaN comes out of what is not computed, forward or backward."""
    heads, batch, seq_len = (FEW, 4, 20) if backend == "triton" else (PLAIN, 10, 13)
    plan = random_plan(16, random_tables(17, BINARY), "sorted", batch, seq_len, documents)
    x, start = data(heads, batch, seq_len, torch.float32), 0
    for group, width in enumerate(3 * n * heads.head_dim for n in heads.heads):
        idle = [label for label, row in enumerate(plan.tables.active) if row[group] == 0]
        x[..., start : start + width].masked_fill_(token_mask(plan, idle)[..., None], torch.nan)
        start += width
    assert bool(x.isnan().any())
    out, dx = forward_backward(op(heads, plan, backend, 5), x)
    assert bool(out.isfinite().all()) and bool((dx[x.isnan()] == 0).all())


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in Triton's interpreter")
def test_the_kernels_skip_what_is_inactive_or_stopped(monkeypatch):
    """Counted in matrix products: blocks of an inactive group cost none, those of a stopped one none backward.

    A head's backward pass over a sequence of 40 is 5 blocks of 3 products for dQ and 4 of 4 for dK and dV. Where the
    sequence is stopped from its token 16 on, 2 and 1 of these blocks are left: keys before it skip the queries behind.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    done, dot = [], InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda *args: done.append(1) or dot(*args))
    heads = HeadLayout((1, 1), (1, 1), 8)
    x = data(heads, 2, 40, torch.float32).requires_grad_()

    def products(active: float, route: float, start: int = 40) -> tuple[int, int]:
        """Forward and backward, with these factors of the second group from this token on, of two times 40."""
        free = random_tables(0, (1.0,), labels=2, groups=2)
        masks = [((1.0, 1.0), (1.0, value)) for value in (active, route)]
        tables = type(free)(free.labels, free.groups, *masks, free.update, free.update_joint)
        done.clear()
        out = op(heads, MaskPlan(tables, merge_label_runs([0, 1], [start, 80 - start]), 2, 40), "triton")(x)
        forward = len(done)
        out.backward(torch.ones_like(out))
        return forward, len(done) - forward

    forward, backward = products(1.0, 1.0)
    assert forward > 0 and backward == 4 * (5 * 3 + 4 * 4)
    assert products(0.0, 1.0) == (forward * 3 // 4, backward * 3 // 4)
    assert products(1.0, 0.0) == (forward, backward * 3 // 4)
    assert products(0.5, 1.0) == (forward, backward)
    assert products(1.0, 0.0, start=56) == (forward, 3 * backward // 4 + 2 * 3 + 1 * 4)


@by_backend
@pytest.mark.parametrize("layout", ["sorted", "tokens"])
def test_strided_gradient(layout, backend):
    heads, batch, seq_len = size(backend)
    plan = random_plan(13, random_tables(14), layout, batch, seq_len)
    x = data(heads, batch, seq_len, torch.float32).requires_grad_()
    out = op(heads, plan, backend)(x)
    dy = random_like(out.permute(1, 2, 0), 2).permute(2, 0, 1)
    strided, packed = (torch.autograd.grad(out, x, d, retain_graph=True)[0] for d in (dy, dy.contiguous()))
    torch.testing.assert_close(strided, packed, rtol=1e-5, atol=1e-6)


@by_exact
@pytest.mark.parametrize("layout", ["sorted", "tokens"])
def test_gradcheck(layout, backend):
    tables = random_tables(14)
    ones = tuple((1.0,) * 3 for _ in tables.labels)
    tables = type(tables)(tables.labels, tables.groups, tables.active, ones, tables.update, tables.update_joint)
    plan = random_plan(15, tables, layout, 4, 5, documents=True)
    function = op(GROUPED, plan, backend, 3, rotary_tables(5, 4))
    torch.autograd.gradcheck(function, data(GROUPED, 4, 5).requires_grad_(), fast_mode=True)


def test_uniform_weights_average_the_visible_values():
    """q = 0: the output is the mean of the values a query sees, which counts the keys of a window."""
    heads, window = HeadLayout((1,), (1,), 2), 3
    plan = MaskPlan.uniform(random_tables(0, (1.0,)), 0, 1, 8)
    qkv = torch.zeros(1, 8, 6)
    qkv[0, :, 4] = torch.arange(8.0)
    for backend in BACKENDS:
        out = op(heads, plan, backend, window)(qkv)[0, :, 0].tolist()
        want = [sum(range(max(0, s - window + 1), s + 1)) / min(s + 1, window) for s in range(8)]
        assert all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(out, want, strict=True))
