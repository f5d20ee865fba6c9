"""Attention in Triton (flash.py): every group of heads in one launch, straight on the columns of the projection.

Reads q, k and v where the projection wrote them, and writes their gradients into one tensor of the same layout. With
rotary positions q and k are turned where they are, if the caller allows it, and v is not touched; else all are copied
once, q and k turned on the way. Their gradients are turned back where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple, TypedDict

import torch
import triton
from torch.library import custom_op

from sgtm_kernels.attention.flash import (
    attention_backward_keys,
    attention_backward_queries,
    attention_forward,
    attention_rotate,
)
from sgtm_kernels.attention.op import HeadLayout
from sgtm_kernels.autograd import captured, eager, existing, register
from sgtm_kernels.plan import MaskPlan, plan_of
from sgtm_kernels.triton_common.tuning import DTYPES, Tunable, bucket

ROTATED = 64  # tokens of a tile that is turned
# Triton before 3.7 copies a query's numbers once for every thread that needs them (128 copies of 32 bits instead of 8
# for 64 queries), which leaves fewer registers: with all masks, blocks of 64 queries x 128 keys spill a kilobyte.
ONE_COPY = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)


class Tile(NamedTuple):
    queries: int
    keys: int
    warps: int
    stages: int


def _tunable(kernel, half_precision: Callable[[int], Tile], others: dict[int, tuple[Tile, ...]]) -> Tunable[Tile]:
    """By dtype and width of a head, a power of two. Heuristic: as large as the registers of sm_90 hold, with sums, and
    so that scores are products of 64 columns: of fewer, its tensor cores wait for the shared memory that the other
    operand comes from (64 x 16 halves of it for each 32 columns: 24 cycles of loads, 16 of products)."""

    def heuristic(dtype: str, width: int) -> Tile:
        if dtype == "fp32":  # multiplied without tensor cores, from registers
            side = 32 if width <= 64 else 16
            return Tile(side, side, 8, 1)
        return half_precision(width)

    return Tunable(kernel.__name__, heuristic, {("bf16", width): tiles for width, tiles in others.items()})


TILES = {
    attention_forward: _tunable(
        attention_forward,
        lambda width: Tile(128, 64, 4 if width <= 32 else 8, 3),
        {32: (Tile(128, 32, 4, 3),), 64: (Tile(128, 64, 8, 4),)},
    ),
    attention_backward_queries: _tunable(
        attention_backward_queries,
        lambda width: Tile(64, 64, 4, 2) if width <= 32 else Tile(128, 64, 8, 2),
        {32: (Tile(128, 64, 8, 2),), 64: (Tile(64, 32, 4, 3),)},
    ),
    # Heads of 128 columns have no registers left for scores of 64: 100 to 220 bytes would spill. Blocks of 128 keys
    # read the queries from the L2 cache half as often as blocks of 64, of which a multiprocessor holds two.
    attention_backward_keys: _tunable(
        attention_backward_keys,
        lambda width: (
            Tile(64 if width <= 64 else 32, 128, 8, 2) if ONE_COPY else Tile(32, 128 if width <= 64 else 64, 8, 2)
        ),
        {
            32: (Tile(32, 128, 8, 2), Tile(64, 128, 8, 2)),
            64: (Tile(32, 128, 8, 2), Tile(64, 128, 8, 2)),
        },
    ),
}


def tile(kernel, width: int, like: torch.Tensor) -> Tile:
    """Blocks for heads of this width, in the dtype and on the device of `like`."""
    return TILES[kernel](like.device, DTYPES[like.dtype], width)


def attention(qkv, layout, plan: MaskPlan, scale, window, rotary, overwrite=False, below=True):
    if not scale > 0:
        raise ValueError(f"the triton backend of attention needs a positive scale, got {scale}")
    cos, sin = rotary or (None, None)
    if captured():
        masks = (plan.handle, layout.heads, layout.kv_heads, layout.head_dim, float(scale), window)
        return masked_attention(qkv, cos, sin, *masks)[0]
    return eager_attention(qkv, cos, sin, plan, layout, float(scale), window, overwrite)


def _forward(qkv, cos, sin, plan, layout, scale, window, overwrite=False):
    """The output, the logarithms of the softmax's sums, and the projection with q and k turned, if any are."""
    launch = _launcher(plan, layout, window, qkv.device)
    packed, turned = qkv.contiguous(), None
    if cos is not None:
        mine = overwrite or packed is not qkv
        packed = turned = _rotated(packed, packed if mine else torch.empty_like(packed), layout, cos, sin)
    qkv = packed
    out = qkv.new_empty(plan.batch, plan.seq_len, launch.heads * layout.head_dim)
    lse = qkv.new_empty(plan.batch, launch.heads, plan.seq_len, dtype=torch.float32)
    launch(attention_forward, scale, qkv, out, lse)
    return out, lse, turned


def _backward(dy, qkv, out, lse, cos, sin, plan, layout, scale, window, wanted):
    """`qkv`: turned already."""
    qkv, dy = qkv.contiguous(), dy.contiguous()
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    launch = _launcher(plan, layout, window, qkv.device)
    launch(attention_backward_queries, scale, qkv, out, dy, lse, delta, dqkv)
    launch(attention_backward_keys, scale, qkv, dy, lse, delta, dqkv)
    if cos is not None:
        _rotated(dqkv, dqkv, layout, cos, sin, backward=True)
    return (dqkv,)


def _keep(inputs, outputs):
    qkv, cos, sin, plan, *numbers = inputs
    out, lse, turned = outputs
    return (qkv if cos is None else turned, out, lse, cos, sin), plan, numbers


eager_attention = eager(_forward, lambda inputs, outputs: _keep(inputs[:-1], outputs), _backward)


ARGUMENTS = "Tensor? cos, Tensor? sin, Tensor plan, int[] heads, int[] kv_heads, int head_dim, float scale, int? window"


@custom_op("sgtm::attention", mutates_args=(), schema=f"(Tensor qkv, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
def masked_attention(qkv, cos, sin, plan, heads, kv_heads, head_dim, scale, window):
    layout = HeadLayout(tuple(heads), tuple(kv_heads), head_dim)
    return existing(qkv, *_forward(qkv, cos, sin, plan_of(plan), layout, scale, window))


@masked_attention.register_fake
def _(qkv, cos, sin, plan, heads, kv_heads, head_dim, scale, window):
    batch, seq_len = qkv.shape[:2]
    out = qkv.new_empty(batch, seq_len, sum(heads) * head_dim)
    lse = qkv.new_empty(batch, sum(heads), seq_len, dtype=torch.float32)
    return out, lse, qkv.new_empty(0 if cos is None else qkv.shape)


@custom_op(
    "sgtm::attention_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor qkv, Tensor out, Tensor lse, {ARGUMENTS}) -> Tensor",
)
def attention_backward(dy, qkv, out, lse, cos, sin, plan, heads, kv_heads, head_dim, scale, window):
    layout = HeadLayout(tuple(heads), tuple(kv_heads), head_dim)
    return _backward(dy, qkv, out, lse, cos, sin, plan_of(plan), layout, scale, window, (True,))[0]


@attention_backward.register_fake
def _(dy, qkv, *arguments):
    return qkv.new_empty(qkv.shape)


register(masked_attention, _keep, lambda *inputs: (attention_backward(*inputs[:-1]),))


def _launcher(plan: MaskPlan, layout: HeadLayout, window: int | None, device: torch.device) -> _Launcher:
    key = ("attention", layout, window, device)
    return plan.cached(key, lambda: _Launcher(plan, layout, window, device))


class _Launcher:
    """What the three kernels share: the masks of a micro-batch and the layout, as arguments and constants."""

    def __init__(self, plan: MaskPlan, layout: HeadLayout, window: int | None, device: torch.device):
        self.batch, self.seq_len = plan.batch, plan.seq_len
        self.heads, self.kv_heads = sum(layout.heads), sum(layout.kv_heads)
        # A layer without groups is not masked, whatever the tables say.
        groups = len(layout.heads) if len(layout.heads) > 1 else 0
        active, route, passes = (plan.tables.columns[table][:groups] for table in ("active", "route", "passes"))
        values = {row[label] for row in (*active, *route) for label in plan.present}
        window = window if window is not None and window < self.seq_len else 0
        fixed = constants(layout, window, plan.documents is not None, values)
        nothing, masked = torch.empty(1, device=device), fixed["MASKED"]
        tables = {
            "factors": plan.factors((*active, *route), device) if masked else nothing,
            "spans": plan.spans(device) if plan.documents is not None else nothing,
            "live": plan.live(passes, device) if masked else nothing,
        }
        self.width = fixed["BD"]
        passed: dict[str, object] = {**tables, **fixed, "seq_len": self.seq_len}
        self.arguments = {
            kernel: {name: passed[name] for name in kernel.arg_names if name in passed} for kernel in TILES
        }

    def __call__(self, kernel, scale: float, *tensors: torch.Tensor) -> None:
        size = tile(kernel, self.width, tensors[0])
        by_keys = kernel is attention_backward_keys
        blocks = -(-self.seq_len // (size.keys if by_keys else size.queries))
        kernel[blocks, self.kv_heads if by_keys else self.heads, self.batch](
            *tensors,
            **self.arguments[kernel],
            scale=scale,
            BQ=size.queries,
            BK=size.keys,
            num_warps=size.warps,
            num_stages=size.stages,
        )


class Columns(TypedDict):
    """The constexprs of flash.py that say where heads are."""

    GROUPS: tuple[tuple[int, ...], ...]
    STRIDE: int
    D: int


class Constants(Columns):
    """All of them but the block sizes."""

    HEADS: int
    BD: int
    WINDOW: int
    DOCUMENTS: bool
    MASKED: bool
    WEIGHTED: bool


def constants(layout: HeadLayout, window: int, documents: bool, values: set[float]) -> Constants:
    """The constexprs of flash.py but the block sizes; values: the factors that occur."""
    return {
        **_columns(layout),
        "HEADS": sum(layout.heads),
        "BD": width_of(layout),
        "WINDOW": window,
        "DOCUMENTS": documents,
        "MASKED": not values <= {1.0},
        "WEIGHTED": not values <= {0.0, 1.0},
    }


@cache
def _columns(layout: HeadLayout) -> Columns:
    starts = zip(*([0, *accumulate(counts)] for counts in (layout.heads, layout.kv_heads)), strict=True)
    bounds = tuple((q, kv, q + 2 * kv) for q, kv in starts)
    groups = tuple((*start, end[0] - start[0], end[1] - start[1]) for start, end in pairwise(bounds))
    return {"GROUPS": groups, "STRIDE": bounds[-1][2] * layout.head_dim, "D": layout.head_dim}


def _rotated(x, to, layout: HeadLayout, cos, sin, backward: bool = False) -> torch.Tensor:
    columns, seq_len, half, in_place = _columns(layout), x.shape[1], _half(layout), to is x
    slots = sum(layout.heads) + sum(layout.kv_heads) if in_place else columns["STRIDE"] // layout.head_dim
    attention_rotate[-(-seq_len // ROTATED), slots, x.shape[0]](
        x, to, cos.float().contiguous(), sin.float().contiguous(), seq_len, **columns, BH=half, BT=ROTATED,
        BACKWARD=backward, IN_PLACE=in_place,
    )  # fmt: skip
    return to


def width_of(layout: HeadLayout) -> int:
    """Columns of a head's tile, a power of two."""
    return bucket(layout.head_dim, 16, 1 << 30)


def _half(layout: HeadLayout) -> int:
    return 1 << (layout.head_dim // 2 - 1).bit_length()
