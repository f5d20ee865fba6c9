"""Flash attention (Dao et al., 2022; Dao, 2023) in Triton, on the columns of `HeadLayout` as they are.

A program of the forward kernel does a block of queries of one head: it walks the blocks of keys that some query sees,
keeping the largest score and the sum of exponentials of each query, and saves the logarithm of that sum (base 2). The
backward kernels compute the probabilities again from it: one does a block of queries and sums dQ over the keys, the
other a block of keys and sums dK and dV over the queries of all heads that share them. Sums are fp32 and in a fixed
order, without atomics: results are deterministic.

Masks cost the inner loops nothing. `active` multiplies what the forward kernel stores. A token whose gradient is
stopped (`active * route` of its head's group is 0) has a saved logarithm of +inf, so that its probabilities come out as
exact zeros in the backward kernels. Blocks without a token to compute are not computed: no key is read for them.

GROUPS holds, for each group of heads, its first query head, its first KV head, its first slot (head_dim columns of
qkv), its number of query heads and of KV heads. D is the head dimension, BD the next power of two from 16; columns
beyond D are zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _slots_of_query_head(head, GROUPS: tl.constexpr):
    """Group of a query head and its slots of q, k and v."""
    group, q, k, v = head * 0, head, head, head
    for i in tl.static_range(len(GROUPS)):
        if GROUPS[i][3] > 0:
            own = head - GROUPS[i][0]
            kv = own // (GROUPS[i][3] // GROUPS[i][4])
            inside = own >= 0
            group = tl.where(inside, i, group)
            q = tl.where(inside, GROUPS[i][2] + own, q)
            k = tl.where(inside, GROUPS[i][2] + GROUPS[i][3] + kv, k)
            v = tl.where(inside, GROUPS[i][2] + GROUPS[i][3] + GROUPS[i][4] + kv, v)
    return group, q, k, v


@triton.jit
def _slots_of_kv_head(head, GROUPS: tl.constexpr):
    """Group of a KV head, its slots of k and v, and its query heads: slot and number of the first, and how many."""
    group, k, v, q, first, share = head * 0, head, head, head, head, head
    for i in tl.static_range(len(GROUPS)):
        if GROUPS[i][3] > 0:
            own = head - GROUPS[i][1]
            inside = own >= 0
            group = tl.where(inside, i, group)
            share = tl.where(inside, GROUPS[i][3] // GROUPS[i][4], share)
            q = tl.where(inside, GROUPS[i][2] + own * share, q)
            k = tl.where(inside, GROUPS[i][2] + GROUPS[i][3] + own, k)
            v = tl.where(inside, GROUPS[i][2] + GROUPS[i][3] + GROUPS[i][4] + own, v)
            first = tl.where(inside, GROUPS[i][0] + own * share, first)
    return group, k, v, q, first, share


@triton.jit
def _rows(base, start, STRIDE: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr):
    """Pointers [ROWS, BD] to rows `start:start + ROWS` of a head."""
    within = tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, BD)[None, :]
    return base + tl.cast(start, tl.int64) * STRIDE + within


@triton.jit
def _load(
    base, start, seq_len, FULL: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Rows `start:start + ROWS` of a head, 0 beyond the sequence and beyond column D; FULL: all rows are inside."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BD)[None, :]
    pointers = base + tl.cast(start, tl.int64) * STRIDE + (row * STRIDE + column)
    if FULL and D == BD:
        return tl.load(pointers)
    elif FULL:
        return tl.load(pointers, mask=column < D, other=0.0)
    else:
        return tl.load(pointers, mask=(start + row < seq_len) & (column < D), other=0.0)


@triton.jit
def _first_key(spans, origin, query, seq_len, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr):
    """First position that a query sees, for one or many; origin: the sequence's first token."""
    first = query * 0
    if DOCUMENTS:
        first = tl.load(spans + origin + tl.minimum(query, seq_len - 1))
    if WINDOW > 0:
        first = tl.maximum(first, query - (WINDOW - 1))
    return first


@triton.jit
def _key_range(
    spans, origin, start, seq_len, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr
):
    """Keys that some query of the block sees, `lo:hi`; in `free:diagonal`, whole blocks, every query sees every key."""
    hi = tl.minimum(start + BQ, seq_len)
    lo = _first_key(spans, origin, start, seq_len, WINDOW, DOCUMENTS) // BK * BK
    diagonal = (start + 1) // BK * BK
    free = tl.cdiv(_first_key(spans, origin, hi - 1, seq_len, WINDOW, DOCUMENTS), BK) * BK
    return lo, tl.minimum(free, diagonal), diagonal, hi


@triton.jit
def _beyond(spans, origin, tokens, key, seq_len, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr):
    """First position after a key that does not see it, for one or many."""
    end = key * 0 + seq_len
    if DOCUMENTS:
        end = tl.load(spans + tokens + origin + tl.minimum(key, seq_len - 1))
    if WINDOW > 0:
        end = tl.minimum(end, key + WINDOW)
    return end


@triton.jit
def _attend(
    acc, total, peak, q, keys, values, lo, hi, query, first, seq_len, scale, HIDDEN: tl.constexpr,
    STRIDE: tl.constexpr, D: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Takes the keys `lo:hi` into the output; HIDDEN: some query does not see some of them."""
    for start in tl.range(lo, hi, BK):
        k = _load(keys, start, seq_len, not HIDDEN, STRIDE, BK, D, q.shape[1])
        v = _load(values, start, seq_len, not HIDDEN, STRIDE, BK, D, q.shape[1])
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if HIDDEN:
            key = start + tl.arange(0, BK)[None, :]
            score = tl.where((key <= query[:, None]) & (key >= first[:, None]), score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        base = higher * scale
        if HIDDEN:  # a query that has seen no key so far
            base = tl.where(higher == float("-inf"), 0.0, base)
        p = tl.exp2(score * scale - base[:, None])
        shrink = tl.exp2(peak * scale - base)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = higher
    return acc, total, peak


@triton.jit
def attention_forward(
    qkv, out, lse, factors, spans, seq_len, scale, GROUPS: tl.constexpr, STRIDE: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, MASKED: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BQ  # the blocks with the most keys first
    head = tl.program_id(1)
    origin = tl.program_id(2).to(tl.int64) * seq_len
    tokens = tl.num_programs(2).to(tl.int64) * seq_len
    group, q_slot, k_slot, v_slot = _slots_of_query_head(head, GROUPS)
    query = start + tl.arange(0, BQ)
    inside = query < seq_len
    first = _first_key(spans, origin, query, seq_len, WINDOW, DOCUMENTS)
    lo, free, diagonal, hi = _key_range(spans, origin, start, seq_len, WINDOW, DOCUMENTS, BQ, BK)
    computed = inside
    if MASKED:
        active = tl.load(factors + group * tokens + origin + query, mask=inside, other=0.0)
        route = tl.load(factors + (len(GROUPS) + group) * tokens + origin + query, mask=inside, other=0.0)
        computed = active != 0.0
        alive = tl.max(computed.to(tl.int32), 0) > 0
        free, diagonal, hi = tl.where(alive, free, lo), tl.where(alive, diagonal, lo), tl.where(alive, hi, lo)

    base = qkv + origin * STRIDE
    column = tl.arange(0, BD)
    wanted = computed[:, None] & (column < D)[None, :]
    q = tl.load(_rows(base + q_slot * D, start, STRIDE, BQ, BD), mask=wanted, other=0.0)
    keys, values = base + k_slot * D, base + v_slot * D
    scale *= LOG2E
    acc = tl.zeros([BQ, BD], tl.float32)
    total = tl.zeros([BQ], tl.float32)
    peak = tl.full([BQ], float("-inf"), tl.float32)
    if WINDOW > 0 or DOCUMENTS:
        acc, total, peak = _attend(
            acc, total, peak, q, keys, values, lo, free, query, first, seq_len, scale, True, STRIDE, D, BK
        )
    acc, total, peak = _attend(
        acc, total, peak, q, keys, values, free, diagonal, query, first, seq_len, scale, False, STRIDE, D, BK
    )
    acc, total, peak = _attend(
        acc, total, peak, q, keys, values, diagonal, hi, query, first, seq_len, scale, True, STRIDE, D, BK
    )
    if MASKED:
        total = tl.where(computed, total, 1.0)
        peak = tl.where(computed & (active * route != 0.0), peak, float("inf"))
        acc = tl.where(computed[:, None], acc / total[:, None] * active[:, None], 0.0)
    else:
        acc = acc / total[:, None]
    OUT: tl.constexpr = HEADS * D
    stored = inside[:, None] & (column < D)[None, :]
    tl.store(_rows(out + origin * OUT + head * D, start, OUT, BQ, BD), acc.to(out.dtype.element_ty), mask=stored)
    tl.store(lse + origin * HEADS + head * seq_len + query, peak * scale + tl.log2(total), mask=inside)


@triton.jit
def _collect_dq(
    dq, q, dy, sums, delta, keys, values, lo, hi, query, first, seq_len, scale, HIDDEN: tl.constexpr,
    STRIDE: tl.constexpr, D: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Adds what the keys `lo:hi` give to dQ."""
    for start in tl.range(lo, hi, BK):
        k = _load(keys, start, seq_len, not HIDDEN, STRIDE, BK, D, q.shape[1])
        v = _load(values, start, seq_len, not HIDDEN, STRIDE, BK, D, q.shape[1])
        power = tl.dot(q, tl.trans(k), input_precision="ieee") * scale - sums[:, None]
        if HIDDEN:
            key = start + tl.arange(0, BK)[None, :]
            power = tl.where((key <= query[:, None]) & (key >= first[:, None]), power, float("-inf"))
        dp = tl.dot(dy, tl.trans(v), input_precision="ieee")
        ds = tl.exp2(power) * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def attention_backward_queries(
    qkv, out, dy, lse, delta, dqkv, factors, spans, seq_len, scale, GROUPS: tl.constexpr, STRIDE: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    MASKED: tl.constexpr, WEIGHTED: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dQ, and for the other kernel `delta`: the sum of dy * out over a head's columns, before `active` and `route`."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BQ
    head = tl.program_id(1)
    origin = tl.program_id(2).to(tl.int64) * seq_len
    tokens = tl.num_programs(2).to(tl.int64) * seq_len
    group, q_slot, k_slot, v_slot = _slots_of_query_head(head, GROUPS)
    query = start + tl.arange(0, BQ)
    inside = query < seq_len
    first = _first_key(spans, origin, query, seq_len, WINDOW, DOCUMENTS)
    lo, free, diagonal, hi = _key_range(spans, origin, start, seq_len, WINDOW, DOCUMENTS, BQ, BK)
    sums = tl.load(lse + origin * HEADS + head * seq_len + query, mask=inside, other=float("inf"))
    computed = inside
    if MASKED:
        computed = sums < float("inf")
        alive = tl.max(computed.to(tl.int32), 0) > 0
        free, diagonal, hi = tl.where(alive, free, lo), tl.where(alive, diagonal, lo), tl.where(alive, hi, lo)

    OUT: tl.constexpr = HEADS * D
    base = qkv + origin * STRIDE
    column = tl.arange(0, BD)
    wanted = computed[:, None] & (column < D)[None, :]
    q = tl.load(_rows(base + q_slot * D, start, STRIDE, BQ, BD), mask=wanted, other=0.0)
    grad = tl.load(_rows(dy + origin * OUT + head * D, start, OUT, BQ, BD), mask=wanted, other=0.0)
    value = tl.load(_rows(out + origin * OUT + head * D, start, OUT, BQ, BD), mask=wanted, other=0.0)
    inner = tl.sum(grad.to(tl.float32) * value.to(tl.float32), 1)
    factor = scale
    if WEIGHTED:
        active = tl.load(factors + group * tokens + origin + query, mask=computed, other=1.0)
        route = tl.load(factors + (len(GROUPS) + group) * tokens + origin + query, mask=computed, other=1.0)
        inner /= active
        factor = (active * route * scale)[:, None]
    tl.store(delta + origin * HEADS + head * seq_len + query, inner, mask=inside)

    keys, values = base + k_slot * D, base + v_slot * D
    dq = tl.zeros([BQ, BD], tl.float32)
    scale *= LOG2E
    if WINDOW > 0 or DOCUMENTS:
        dq = _collect_dq(
            dq, q, grad, sums, inner, keys, values, lo, free, query, first, seq_len, scale, True, STRIDE, D, BK
        )
    dq = _collect_dq(
        dq, q, grad, sums, inner, keys, values, free, diagonal, query, first, seq_len, scale, False, STRIDE, D, BK
    )
    dq = _collect_dq(
        dq, q, grad, sums, inner, keys, values, diagonal, hi, query, first, seq_len, scale, True, STRIDE, D, BK
    )
    stored = inside[:, None] & (column < D)[None, :]
    dq_at = _rows(dqkv + origin * STRIDE + q_slot * D, start, STRIDE, BQ, BD)
    tl.store(dq_at, (dq * factor).to(dqkv.dtype.element_ty), mask=stored)


@triton.jit
def _collect_dk_dv(
    dk, dv, k, v, queries, grads, lse, delta, active, route, lo, hi, key, beyond, seq_len, scale,
    HIDDEN: tl.constexpr, WEIGHTED: tl.constexpr, STRIDE: tl.constexpr, OUT: tl.constexpr, D: tl.constexpr,
    BQ: tl.constexpr,
):  # fmt: skip
    """Adds what the queries `lo:hi` of one head give to dK and dV."""
    for start in tl.range(lo, hi, BQ):
        query = start + tl.arange(0, BQ)
        inside = query < seq_len
        q = _load(queries, start, seq_len, False, STRIDE, BQ, D, k.shape[1])
        grad = _load(grads, start, seq_len, False, OUT, BQ, D, k.shape[1])
        sums = tl.load(lse + query, mask=inside, other=float("inf"))
        inner = tl.load(delta + query, mask=inside, other=0.0)
        power = tl.dot(k, tl.trans(q), input_precision="ieee") * scale - sums[None, :]
        if HIDDEN:
            seen = (query[None, :] >= key[:, None]) & (query[None, :] < beyond[:, None])
            power = tl.where(seen, power, float("-inf"))
        p = tl.exp2(power)
        if WEIGHTED:
            factor = tl.load(active + query, mask=inside, other=0.0) * tl.load(route + query, mask=inside, other=0.0)
            p *= factor[None, :]
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
        ds = p * (dp - inner[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def attention_backward_keys(
    qkv, dy, lse, delta, dqkv, factors, spans, live, seq_len, scale, GROUPS: tl.constexpr, STRIDE: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    MASKED: tl.constexpr, WEIGHTED: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dK and dV. `live`: for each group and token the first token from it on that gives a gradient, and the end of the
    last one up to it; what lies outside is not read."""
    start = tl.program_id(0) * BK
    origin = tl.program_id(2).to(tl.int64) * seq_len
    tokens = tl.num_programs(2).to(tl.int64) * seq_len
    group, k_slot, v_slot, q_slot, first_head, share = _slots_of_kv_head(tl.program_id(1), GROUPS)
    key = start + tl.arange(0, BK)
    beyond = _beyond(spans, origin, tokens, key, seq_len, WINDOW, DOCUMENTS)
    last = tl.minimum(start + BK, seq_len) - 1
    lo = start
    hi = _beyond(spans, origin, tokens, last, seq_len, WINDOW, DOCUMENTS)
    diagonal = tl.cdiv(start + BK - 1, BQ) * BQ  # from here to `free`, every query sees every key of the block
    free = hi
    if WINDOW > 0 or DOCUMENTS:
        free = _beyond(spans, origin, tokens, start, seq_len, WINDOW, DOCUMENTS) // BQ * BQ
    if MASKED:
        lo = (tl.load(live + group * tokens + origin + start) - origin).to(tl.int32)
        end = (tl.load(live + (len(GROUPS) + group) * tokens + origin + hi - 1) - origin).to(tl.int32)
        hi = tl.minimum(hi, end)
        lo = tl.minimum(lo, hi)
    lo = tl.where(lo < hi, lo // BQ * BQ, hi)
    diagonal = tl.minimum(tl.maximum(diagonal, lo), hi)
    free = tl.minimum(tl.maximum(free, diagonal), hi)

    OUT: tl.constexpr = HEADS * D
    base = qkv + origin * STRIDE
    k = _load(base + k_slot * D, start, seq_len, False, STRIDE, BK, D, BD)
    v = _load(base + v_slot * D, start, seq_len, False, STRIDE, BK, D, BD)
    dk = tl.zeros([BK, BD], tl.float32)
    dv = tl.zeros([BK, BD], tl.float32)
    active = factors + group * tokens + origin
    route = factors + (len(GROUPS) + group) * tokens + origin
    for i in tl.range(0, share):
        head = first_head + i
        queries, grads = base + (q_slot + i) * D, dy + origin * OUT + head * D
        sums, inner = lse + origin * HEADS + head * seq_len, delta + origin * HEADS + head * seq_len
        dk, dv = _collect_dk_dv(
            dk, dv, k, v, queries, grads, sums, inner, active, route, lo, diagonal, key, beyond, seq_len,
            scale * LOG2E, True, WEIGHTED, STRIDE, OUT, D, BQ,
        )  # fmt: skip
        dk, dv = _collect_dk_dv(
            dk, dv, k, v, queries, grads, sums, inner, active, route, diagonal, free, key, beyond, seq_len,
            scale * LOG2E, False, WEIGHTED, STRIDE, OUT, D, BQ,
        )  # fmt: skip
        if WINDOW > 0 or DOCUMENTS:
            dk, dv = _collect_dk_dv(
                dk, dv, k, v, queries, grads, sums, inner, active, route, free, hi, key, beyond, seq_len,
                scale * LOG2E, True, WEIGHTED, STRIDE, OUT, D, BQ,
            )  # fmt: skip
    column = tl.arange(0, BD)
    stored = (key < seq_len)[:, None] & (column < D)[None, :]
    to = dqkv + origin * STRIDE
    tl.store(_rows(to + k_slot * D, start, STRIDE, BK, BD), (dk * scale).to(dqkv.dtype.element_ty), mask=stored)
    tl.store(_rows(to + v_slot * D, start, STRIDE, BK, BD), dv.to(dqkv.dtype.element_ty), mask=stored)


@triton.jit
def attention_rotate(
    x, y, cos, sin, seq_len, GROUPS: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BH: tl.constexpr,
    BT: tl.constexpr, BACKWARD: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Rotary positions for the q and k columns of x; BACKWARD: the gradient. IN_PLACE: x is y, and there are programs
    for slots of q and k alone; else the v columns are copied."""
    row = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    number = tl.program_id(1)
    column = tl.arange(0, BH)[None, :]
    inside = (row < seq_len) & (column < D // 2)
    slot, turned = number, number >= 0
    for i in tl.static_range(len(GROUPS)):
        if GROUPS[i][3] > 0:
            if IN_PLACE:
                own = number - (GROUPS[i][0] + GROUPS[i][1])
                slot = tl.where(own >= 0, GROUPS[i][2] + own, slot)
            else:
                own = number - GROUPS[i][2]
                turned = tl.where(own >= 0, own < GROUPS[i][3] + GROUPS[i][4], turned)
    offsets = (tl.program_id(2).to(tl.int64) * seq_len + row) * STRIDE + slot * D + column
    low = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + offsets + D // 2, mask=inside, other=0.0).to(tl.float32)
    angle = row * D + column
    needed = inside & turned
    cos_low = tl.load(cos + angle, mask=needed, other=1.0)
    cos_high = tl.load(cos + angle + D // 2, mask=needed, other=1.0)
    sin_low = tl.load(sin + angle, mask=needed, other=0.0)
    sin_high = tl.load(sin + angle + D // 2, mask=needed, other=0.0)
    if BACKWARD:
        new_low, new_high = low * cos_low + high * sin_high, high * cos_high - low * sin_low
    else:
        new_low, new_high = low * cos_low - high * sin_low, high * cos_high + low * sin_high
    tl.store(y + offsets, new_low.to(y.dtype.element_ty), mask=inside)
    tl.store(y + offsets + D // 2, new_high.to(y.dtype.element_ty), mask=inside)
