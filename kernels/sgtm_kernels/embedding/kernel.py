"""Gradient of a masked table lookup without atomics: tokens sorted by id, the rows of one id added in fp32.

Tokens that may not update the table sort behind the others and are never read, so that their ids cannot move the rest
either. The sorted tokens are cut into segments of fixed length; an id whose tokens lie in more than one of them is
added up segment by segment first (`embedding_partials`), so that a frequent id keeps many programs busy. Then
`embedding_backward` writes every row of the table exactly once, rows without a token as zeros: filling the table with
zeros first would write the rows that have tokens twice. dY is read once in all. Nothing is read back by the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.library import custom_op

from sgtm_kernels.autograd import captured, eager, register
from sgtm_kernels.plan import MaskPlan, plan_of

SEGMENT = 32  # sorted tokens
PARTIAL_COLUMNS = 128  # of a tile of `embedding_partials`, SEGMENT tokens high
TILE, MAX_COLUMNS = 2048, 1024  # elements and widest row of a tile of `embedding_backward`
UNROLL = 4  # loads under way at once in its sums


def embedding(ids, weight, plan: MaskPlan, kind: str):
    if captured():
        return lookup(ids, weight, plan.handle, kind)
    return eager_lookup(ids, weight, plan, kind)


def _forward(ids, weight, plan, kind):
    return F.embedding(ids, weight)


def _keep(inputs, output):
    ids, weight, plan, kind = inputs
    return (ids,), plan, (kind, weight.shape[0], weight.dtype)


def _backward(dy, ids, plan, kind, rows, dtype, wanted):
    return None, _gradient(ids, dy, plan, kind, rows, dtype)


def _gradient(ids, dy, plan, kind, rows, dtype):
    """Gradient [rows, D] of the table from dy [B, S, D]; the masked tokens are known on the CPU, their ids are not."""
    learners, width, dy = plan.joint(kind), dy.shape[-1], dy.contiguous()
    tokens = sum(end - start for start, end, _ in learners.slices)
    if tokens == 0:
        return dy.new_zeros(rows, width, dtype=dtype)
    keys = ids.flatten().to(torch.int32)
    factors = None
    if not plan.plain(learners):
        factors = plan.factors((learners.by_label,), dy.device)
        keys = torch.where(factors[0] == 0, rows, keys)
    keys, order = torch.sort(keys, stable=True)
    starts = torch.searchsorted(keys, torch.arange(rows + 1, dtype=keys.dtype, device=keys.device), out_int32=True)
    segments = -(-tokens // SEGMENT)
    partials = torch.empty(segments, 2, width, dtype=torch.float32, device=dy.device)
    factors = partials if factors is None else factors
    constants = {"WEIGHTED": any(weight != 1 for _, _, weight in learners.slices), "WIDTH": width, "SEGMENT": SEGMENT}
    grid = (segments, -(-width // PARTIAL_COLUMNS))
    embedding_partials[grid](dy, keys, order, factors, partials, tokens, **constants, BD=PARTIAL_COLUMNS)
    dw = torch.empty(rows, width, dtype=dtype, device=dy.device)
    tile = _tile(width)
    grid = (-(-rows // tile["BR"]), -(-width // tile["BD"]))
    embedding_backward[grid](dy, starts, order, factors, partials, dw, rows, **constants, **tile)
    return dw


eager_lookup = eager(_forward, _keep, _backward)


@custom_op("sgtm::embedding", mutates_args=(), schema="(Tensor ids, Tensor weight, Tensor plan, str kind) -> Tensor")
def lookup(ids, weight, plan, kind):
    return F.embedding(ids, weight)


@lookup.register_fake
def _(ids, weight, plan, kind):
    return weight.new_empty(*ids.shape, weight.shape[1])


@custom_op(
    "sgtm::embedding_backward",
    mutates_args=(),
    schema="(Tensor ids, Tensor dy, Tensor plan, str kind, SymInt rows, ScalarType dtype) -> Tensor",
)
def table_gradient(ids, dy, plan, kind, rows, dtype):
    return _gradient(ids, dy, plan_of(plan), kind, rows, dtype)


@table_gradient.register_fake
def _(ids, dy, plan, kind, rows, dtype):
    return dy.new_empty(rows, dy.shape[-1], dtype=dtype)


register(lookup, _keep, lambda dy, ids, *numbers: (None, table_gradient(ids, dy, *numbers[:-1])))


def _tile(width: int) -> dict[str, int]:
    columns = min(triton.next_power_of_2(width), MAX_COLUMNS)
    return {"BR": max(1, TILE // max(columns, 256)), "BD": columns, "UNROLL": UNROLL}


@triton.jit
def _rows(dy, token, factors, column, valid, WEIGHTED: tl.constexpr, WIDTH: tl.constexpr):
    """fp32 [tokens, columns]: rows of dY times the tokens' factors, 0 where not `valid`."""
    inside = valid[:, None] & (column < WIDTH)[None, :]
    value = tl.load(dy + token[:, None] * WIDTH + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        value *= tl.load(factors + token, mask=valid, other=0.0)[:, None]
    return value


@triton.jit
def _store_sum(
    dy, order, factors, out, positions, column, chosen, WEIGHTED: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    token = tl.load(order + positions, mask=chosen, other=0)
    total = tl.sum(_rows(dy, token, factors, column, chosen, WEIGHTED, WIDTH), 0)
    tl.store(out + column, total, mask=column < WIDTH)


@triton.jit(do_not_specialize=["tokens"])
def embedding_partials(
    dy, ids, order, factors, partials, tokens, WEIGHTED: tl.constexpr, WIDTH: tl.constexpr, SEGMENT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """partials fp32 [segments, 2, WIDTH]: the part of an id that began in an earlier segment; that begins here and goes
    on in the next. Written only where there is such an id."""
    segment = tl.program_id(0).to(tl.int64)
    start = segment * SEGMENT
    end = tl.minimum(start + SEGMENT, tokens)
    before = tl.load(ids + start - 1, mask=start > 0, other=-1)
    first = tl.load(ids + start)
    last = tl.load(ids + end - 1)
    after = tl.load(ids + end, mask=end < tokens, other=-1)
    positions = start + tl.arange(0, SEGMENT)
    mine = tl.load(ids + positions, mask=positions < end, other=-1)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    out = partials + 2 * segment * WIDTH
    if before == first:
        _store_sum(dy, order, factors, out, positions, column, mine == first, WEIGHTED, WIDTH)
    if (after == last) & ((before != last) | (first != last)):
        _store_sum(dy, order, factors, out + WIDTH, positions, column, mine == last, WEIGHTED, WIDTH)


@triton.jit(do_not_specialize=["rows"])
def embedding_backward(
    dy, starts, order, factors, partials, dw, rows, WEIGHTED: tl.constexpr, WIDTH: tl.constexpr, SEGMENT: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """starts int32 [rows + 1]: position of each id's first token in `order`, the token numbers sorted by id."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    start = tl.load(starts + row, mask=row < rows, other=0)
    end = tl.load(starts + row + 1, mask=row < rows, other=0)
    first, last = start // SEGMENT, tl.maximum(end - 1, start) // SEGMENT
    total = tl.zeros([BR, BD], dtype=tl.float32)
    count = tl.where(first == last, end - start, 0)
    for base in range(0, tl.max(count, 0), UNROLL):
        for i in tl.static_range(UNROLL):
            valid = base + i < count
            token = tl.load(order + start + base + i, mask=valid, other=0)
            total += _rows(dy, token, factors, column, valid, WEIGHTED, WIDTH)
    count = tl.where(first == last, 0, last - first + 1)
    for base in range(0, tl.max(count, 0), UNROLL):
        for i in tl.static_range(UNROLL):
            inside = (base + i < count)[:, None] & (column < WIDTH)[None, :]
            partial = 2 * (first + base + i) + (base + i == 0)
            offsets = partial.to(tl.int64)[:, None] * WIDTH + column[None, :]
            total += tl.load(partials + offsets, mask=inside, other=0.0)
    offsets = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    tl.store(dw + offsets, total.to(dw.dtype.element_ty), mask=inside)
