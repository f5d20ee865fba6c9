"""Attention in Triton (flash.py): every group of heads in one launch, straight on the columns of the projection.

Reads q, k and v where the projection wrote them, and writes their gradients into one tensor of the same layout. With
rotary positions, q, k and v are copied once, q and k turned on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise, product
from typing import NamedTuple

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
from sgtm_kernels.launch import Launch
from sgtm_kernels.plan import MaskPlan, plan_of
from sgtm_kernels.scale import products
from sgtm_kernels.tuning import DTYPES, Tunable

ROTATED = 64  # tokens of a tile that is turned
WIDE_HEADS = {  # why registers may spill with heads wider than 64
    attention_forward: "up to 16 bytes on one architecture; half the keys a block spill none but halve the products",
    attention_backward_keys: "on sm_100 alone; blocks that spill none there are too small for sm_90's instructions",
}

FP32_KEYS = "16 bytes on sm_90 where nothing is masked; smaller blocks do less for each load"


class Tile(NamedTuple):
    queries: int
    keys: int
    warps: int
    stages: int


def _tunable(kernel, half_precision: Callable[[int], Tile], others: dict[int, tuple[Tile, ...]]) -> Tunable:
    """By dtype and width of a head, a power of two. Heuristic: as large as the registers of sm_80 hold, with sums."""

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
        lambda width: Tile(64, 64, 4 if width <= 32 else 8, 2),
        {32: (Tile(128, 64, 8, 2),), 64: (Tile(64, 32, 4, 3),)},
    ),
    attention_backward_keys: _tunable(
        attention_backward_keys,
        lambda width: Tile(32, 128 if width <= 64 else 64, 8, 2),
        {32: (Tile(32, 128, 8, 3),)},
    ),
}


def tile(kernel, width: int, like: torch.Tensor) -> Tile:
    """Blocks for heads of this width, in the dtype and on the device of `like`."""
    return TILES[kernel](like.device, DTYPES[like.dtype], width)


def attention(qkv, layout, plan: MaskPlan, scale, window, rotary):
    if not scale > 0:
        raise ValueError(f"the triton backend of attention needs a positive scale, got {scale}")
    cos, sin = rotary or (None, None)
    masks = (plan.handle, layout.heads, layout.kv_heads, layout.head_dim, float(scale), window)
    return masked_attention(qkv, cos, sin, *masks)[0]


ARGUMENTS = "Tensor? cos, Tensor? sin, Tensor plan, int[] heads, int[] kv_heads, int head_dim, float scale, int? window"


@custom_op("sgtm::attention", mutates_args=(), schema=f"(Tensor qkv, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
def masked_attention(qkv, cos, sin, plan, heads, kv_heads, head_dim, scale, window):
    """The output, the logarithms of the softmax's sums, and the projection with q and k turned (or nothing)."""
    layout = HeadLayout(tuple(heads), tuple(kv_heads), head_dim)
    qkv, turned = qkv.contiguous(), qkv.new_empty(0)
    if cos is not None:
        qkv = turned = _rotated(qkv, torch.empty_like(qkv), layout, cos, sin)
    out = qkv.new_empty(*qkv.shape[:2], sum(heads) * head_dim)
    lse = qkv.new_empty(qkv.shape[0], sum(heads), qkv.shape[1], dtype=torch.float32)
    _Launcher(qkv, layout, plan_of(plan), scale, window)(attention_forward, qkv, out, lse)
    return out, lse, turned


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
    """`qkv`: turned already."""
    layout = HeadLayout(tuple(heads), tuple(kv_heads), head_dim)
    qkv, dy = qkv.contiguous(), dy.contiguous()
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    launch = _Launcher(qkv, layout, plan_of(plan), scale, window)
    launch(attention_backward_queries, qkv, out, dy, lse, delta, dqkv)
    launch(attention_backward_keys, qkv, dy, lse, delta, dqkv)
    if cos is not None:
        _rotated(dqkv, dqkv, layout, cos, sin, backward=True)
    return dqkv


@attention_backward.register_fake
def _(dy, qkv, *arguments):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output):
    qkv, cos, sin, plan, *ctx.numbers = inputs
    out, lse, turned = output
    ctx.mark_non_differentiable(lse, turned)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv if cos is None else turned, out, lse, cos, sin, plan)


def _gradient(ctx, dy, *_):
    return attention_backward(dy, *ctx.saved_tensors, *ctx.numbers), *[None] * 8


masked_attention.register_autograd(_gradient, setup_context=_save)


class _Launcher:
    """What the three kernels share: the masks of a micro-batch and the layout, as arguments and constants."""

    def __init__(self, qkv: torch.Tensor, layout: HeadLayout, plan: MaskPlan, scale: float, window: int | None):
        self.batch, self.seq_len = qkv.shape[:2]
        self.layout, self.scale = layout, scale
        groups = range(len(layout.heads)) if len(layout.heads) > 1 else ()  # a layer without groups is not masked
        active, route = ([plan.column(table, g) for g in groups] for table in ("active", "route"))
        values = {row[label] for row in (*active, *route) for label in plan.present}
        window = window if window is not None and window < self.seq_len else 0
        self.constants = constants(layout, window, plan.documents is not None, values)
        nothing = qkv.new_empty(1)
        masked = self.constants["MASKED"]
        self.tables = {
            "factors": plan.factors((*active, *route), qkv.device) if masked else nothing,
            "spans": plan.spans(qkv.device) if plan.documents is not None else nothing,
            "live": plan.live([products(*rows) for rows in zip(active, route, strict=True)], qkv.device)
            if masked
            else nothing,
        }

    def __call__(self, kernel, *tensors: torch.Tensor) -> None:
        size = tile(kernel, self.constants["BD"], tensors[0])
        by_keys = kernel is attention_backward_keys
        blocks = triton.cdiv(self.seq_len, size.keys if by_keys else size.queries)
        heads = sum(self.layout.kv_heads if by_keys else self.layout.heads)
        kernel[blocks, heads, self.batch](
            *tensors,
            **{name: table for name, table in self.tables.items() if name in kernel.arg_names},
            **{name: value for name, value in self.constants.items() if name in kernel.arg_names},
            seq_len=self.seq_len,
            scale=self.scale,
            BQ=size.queries,
            BK=size.keys,
            num_warps=size.warps,
            num_stages=size.stages,
        )


def constants(layout: HeadLayout, window: int, documents: bool, values: set[float]) -> dict[str, object]:
    """The constexprs of flash.py but the block sizes; values: the factors that occur."""
    return {
        **_columns(layout),
        "HEADS": sum(layout.heads),
        "BD": max(16, triton.next_power_of_2(layout.head_dim)),
        "WINDOW": window,
        "DOCUMENTS": documents,
        "MASKED": not values <= {1.0},
        "WEIGHTED": not values <= {0.0, 1.0},
    }


def _columns(layout: HeadLayout) -> dict[str, object]:
    starts = zip(*([0, *accumulate(counts)] for counts in (layout.heads, layout.kv_heads)), strict=True)
    bounds = tuple((q, kv, q + 2 * kv) for q, kv in starts)
    groups = tuple((*at, after[0] - at[0], after[1] - at[1]) for at, after in pairwise(bounds))
    return {"GROUPS": groups, "STRIDE": bounds[-1][2] * layout.head_dim, "D": layout.head_dim}


def _rotated(x, to, layout: HeadLayout, cos, sin, backward: bool = False) -> torch.Tensor:
    columns, rotary = _columns(layout), (cos.float().contiguous(), sin.float().contiguous())
    grid = (triton.cdiv(x.shape[1], ROTATED), columns["STRIDE"] // layout.head_dim, x.shape[0])
    half = triton.next_power_of_2(layout.head_dim // 2)
    attention_rotate[grid](x, to, *rotary, x.shape[1], **columns, BH=half, BT=ROTATED, BACKWARD=backward)
    return to


def launches() -> list[Launch]:
    """Every block size at some widths of a head, bare and with all masks, and in the common one every flag, in bf16 and
    fp32, for the ahead-of-time suite. Candidates besides the heuristic in the head sizes that fill their width."""
    found = []
    for head_dim in (8, 24, 32, 64, 96, 128):
        plain, grouped = HeadLayout((32,), (32,), head_dim), HeadLayout((24, 0, 8), (6, 0, 2), head_dim)
        others = head_dim in (32, 64)
        found += _launches("bf16", constants(plain, 0, False, {1.0}), others)
        for dtype in ("bf16", "fp32"):
            found += _launches(dtype, constants(grouped, 256, True, {0.0, 0.5}), others)
            found += [_launch_of_rotation(dtype, grouped, backward) for backward in (False, True)]
    flags = product((0, 256), (False, True), ({1.0}, {0.0, 1.0}, {0.0, 0.5}))
    for dtype, masks in product(("bf16", "fp32"), flags):
        found += _launches(dtype, constants(HeadLayout((24, 8), (6, 2), 64), *masks))
    return found


def _launches(dtype: str, fixed: dict[str, object], others: bool = False) -> list[Launch]:
    kinds = dict.fromkeys(("qkv", "out", "dy", "dqkv"), f"*{dtype}") | {"scale": "fp32", "seq_len": "i32"}
    kinds |= dict.fromkeys(("lse", "delta", "factors"), "*fp32") | dict.fromkeys(("spans", "live"), "*i32")
    found = []
    for kernel, tunable in TILES.items():
        width = fixed["BD"]
        values = {k: v for k, v in fixed.items() if k in kernel.arg_names}
        signature = {k: kinds[k] for k in kernel.arg_names if k in kinds}
        for i, size in enumerate(tunable.candidates(dtype, width)[: None if others else 1]):
            blocks = {"BQ": size.queries, "BK": size.keys}
            spill = WIDE_HEADS.get(kernel) if width > 64 and i == 0 else None
            if (kernel, dtype, width) == (attention_backward_keys, "fp32", 64):
                spill = FP32_KEYS
            found.append(
                Launch(
                    kernel, signature, values | blocks, size.warps, size.stages, ("seq_len",),
                    tensor_cores=dtype == "bf16", spill=spill,
                )
            )  # fmt: skip
    return found


def _launch_of_rotation(dtype: str, layout: HeadLayout, backward: bool) -> Launch:
    signature = {"x": f"*{dtype}", "y": f"*{dtype}", "cos": "*fp32", "sin": "*fp32", "seq_len": "i32"}
    fixed = _columns(layout) | {"BH": triton.next_power_of_2(layout.head_dim // 2), "BT": ROTATED, "BACKWARD": backward}
    return Launch(attention_rotate, signature, fixed, unaligned=("seq_len",))
