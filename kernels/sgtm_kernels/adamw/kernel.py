"""AdamW in one Triton launch for all slices of a step.

What follows from the slices alone is on the device from the first step on: which blocks of which slice there are, and
of which tensor. A step brings one small table, copied without waiting: the addresses of its tensors, and for each pair
of step count and weight decay the numbers of the formula. Memory outside the slices is never read or written. Tensors
that begin at the same distance from a 16-byte border in all four parts are cut into blocks at such borders and moved 16
bytes at a time.

Division and square root are rounded correctly and multiplications and additions are not contracted: the new value of an
element depends on nothing but its old values and the slice's numbers, on any device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from sgtm_kernels.adamw.op import Step, Tensors, WeightSlice

BLOCK = 1024  # elements
BORDER = tl.constexpr(4)  # elements of fp32 between 16-byte borders
ROW = tl.constexpr(5)  # int64 of a slice: tensor, first element, end, numbers, first block
LOCATION = tl.constexpr(6)  # int64 of a tensor: 4 addresses at or before its begin, elements from there or -1, unused
GRADS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def prepare(slices: Sequence[WeightSlice], betas: tuple[float, float], eps: float) -> Step:
    return _Step(slices, betas, eps)


class _Step:
    """The launch of these slices: `rows` and `blocks` are made once, `table` is that of a step."""

    def __init__(self, slices: Sequence[WeightSlice], betas: tuple[float, float], eps: float):
        self.betas, self.eps = betas, eps
        self.pairs: dict[tuple[int, float], int] = {}  # (counter, decay): index of its numbers
        rows: list[list[int]] = []
        lengths: list[int] = []
        first = 0
        for tensor, start, end, counter, decay in slices:
            if start < end:
                number = self.pairs.setdefault((counter, decay), len(self.pairs))
                rows.append([tensor, start, end, number, first])
                lengths.append(-(-(end - start + BORDER.value - 1) // BLOCK))  # enough, wherever its first border is
                first += lengths[-1]
        self.ends: dict[int, int] = {}
        for tensor, _, end, *_ in rows:
            self.ends[tensor] = max(end, self.ends.get(tensor, 0))
        self.rows = torch.tensor(rows, dtype=torch.int64, device="cpu")
        index = torch.arange(len(rows), dtype=torch.int32, device="cpu")
        self.blocks = index.repeat_interleave(torch.tensor(lengths, dtype=torch.int64, device="cpu"))
        self.addresses: list[int] = []  # what has been checked
        self.lengths: list[int] = []

    def __call__(self, tensors: Sequence[Tensors], counts: Sequence[int], lr: float, factor: float) -> None:
        if not len(self.rows):
            return
        device, dtype = tensors[0][0].device, tensors[0][1].dtype
        table, numbers = self.table(tensors, counts, lr)
        if device.type == "cuda":
            table = table.pin_memory().to(device, non_blocking=True)
        if self.rows.device != device:
            self.rows, self.blocks = self.rows.to(device), self.blocks.to(device)
        beta1, beta2 = self.betas
        adamw_update[(len(self.blocks),)](
            self.rows, self.blocks, table, table.view(torch.float32)[numbers:],
            beta1, 1 - beta1, beta2, 1 - beta2, self.eps, factor,
            GRAD=GRADS[dtype], BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip

    def table(self, tensors: Sequence[Tensors], counts: Sequence[int], lr: float) -> tuple[torch.Tensor, int]:
        """Locations of the tensors and numbers of the pairs, int64 on the CPU, and the first number in units of fp32.

        Raises ValueError for tensors that are not of the documented dtype, not contiguous or of another length.
        """
        weights, grads, *moments = zip(*tensors, strict=True)
        lengths = _lengths(grads)  # gradients are often new in every step, the others seldom
        addresses = [t.data_ptr() for column in (weights, *moments) for t in column]
        if addresses != self.addresses or lengths != self.lengths:
            _check(tensors, self.ends)
            self.addresses, self.lengths = addresses, lengths
        n = len(grads)
        columns = torch.tensor([*addresses[:n], *(t.data_ptr() for t in grads), *addresses[n:]], device="cpu")
        beta1, beta2 = self.betas
        rows = [
            (1 - lr * decay, lr / (1 - beta1 ** counts[counter]), math.sqrt(1 - beta2 ** counts[counter]), 0.0)
            for counter, decay in self.pairs
        ]
        numbers = torch.tensor(rows, dtype=torch.float32, device="cpu").view(torch.int64)
        locations = _locations(columns.view(4, n), grads[0].element_size())
        return torch.cat([locations.view(-1), numbers.view(-1)]), 2 * locations.numel()


def _locations(addresses: torch.Tensor, grad_size: int) -> torch.Tensor:
    """Rows laid out as LOCATION, int64 [tensors, 6], of addresses int64 [4, tensors]; grad_size: its bytes."""
    sizes = torch.tensor([4, grad_size, 4, 4], device="cpu")[:, None]
    shifts = addresses // sizes % BORDER.value
    alike = ((shifts == shifts[0]) & (addresses % sizes == 0)).all(0)
    shift = torch.where(alike, shifts[0], 0)
    rows = [*(addresses - shift * sizes), torch.where(alike, shift, -1), torch.zeros_like(shift)]
    return torch.stack(rows, dim=1)


def _lengths(grads: Sequence[torch.Tensor]) -> list[int]:
    """Elements of the gradients. Raises ValueError where one is not contiguous, or they differ in dtype."""
    dtype = grads[0].dtype
    for grad in grads:
        if grad.dtype != dtype:
            raise ValueError(f"gradients of one step must have one dtype, got {dtype} and {grad.dtype}")
        if not grad.is_contiguous():
            raise ValueError("the tensors of a slice must be contiguous, of one length and on one device")
    return [grad.numel() for grad in grads]


def _check(tensors: Sequence[Tensors], ends: dict[int, int]) -> None:
    for number, (weight, grad, *moments) in enumerate(tensors):
        parts = (weight, grad, *moments)
        if any(t.dtype != torch.float32 for t in (weight, *moments)) or grad.dtype not in GRADS:
            raise ValueError(f"AdamW's kernel needs fp32 weights and moments, got {[t.dtype for t in parts]}")
        if any(t.numel() != weight.numel() or not t.is_contiguous() or t.device != weight.device for t in parts):
            raise ValueError("the tensors of a slice must be contiguous, of one length and on one device")
        if ends.get(number, 0) > weight.numel():
            raise ValueError(f"a slice ends at {ends[number]}, behind the {weight.numel()} elements of its tensor")


@triton.jit
def _update_block(
    weights, grads, exp_avgs, exp_avg_sqs, index, inside, keep, step_size, root, beta1, rest1, beta2, rest2, eps, factor
):  # fmt: skip
    grad = tl.load(grads + index, mask=inside).to(tl.float32) * factor
    m = tl.load(exp_avgs + index, mask=inside) * beta1 + grad * rest1
    v = tl.load(exp_avg_sqs + index, mask=inside) * beta2 + grad * grad * rest2
    step = step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    tl.store(weights + index, tl.load(weights + index, mask=inside) * keep - step, mask=inside)
    tl.store(exp_avgs + index, m, mask=inside)
    tl.store(exp_avg_sqs + index, v, mask=inside)


@triton.jit
def adamw_update(
    rows, blocks, locations, numbers, beta1, rest1, beta2, rest2, eps, factor, GRAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """rows, locations: as ROW and LOCATION say; blocks: int32, slice of each block; numbers: fp32, four for a pair."""
    block = tl.program_id(0)
    row = rows + tl.load(blocks + block) * ROW
    location = locations + tl.load(row) * LOCATION
    weights = tl.load(location).to(tl.pointer_type(tl.float32))
    grads = tl.load(location + 1).to(tl.pointer_type(GRAD))
    exp_avgs = tl.load(location + 2).to(tl.pointer_type(tl.float32))
    exp_avg_sqs = tl.load(location + 3).to(tl.pointer_type(tl.float32))
    shift = tl.load(location + 4)
    aligned = shift >= 0
    shift = tl.maximum(shift, 0)
    start, end = tl.load(row + 1) + shift, tl.load(row + 2) + shift
    offset = start // BORDER * BORDER + (block - tl.load(row + 4)) * BLOCK
    number = numbers + tl.load(row + 3) * 4
    keep, step_size, root = tl.load(number), tl.load(number + 1), tl.load(number + 2)
    index = tl.multiple_of(offset, 4) + tl.arange(0, BLOCK)
    if aligned & (offset >= start) & (offset + BLOCK <= end):
        weights = tl.multiple_of(weights, 16)
        grads = tl.multiple_of(grads, 4 * GRAD.primitive_bitwidth // 8)
        exp_avgs = tl.multiple_of(exp_avgs, 16)
        exp_avg_sqs = tl.multiple_of(exp_avg_sqs, 16)
        _update_block(
            weights, grads, exp_avgs, exp_avg_sqs, index, None,
            keep, step_size, root, beta1, rest1, beta2, rest2, eps, factor,
        )  # fmt: skip
    else:
        inside = (index >= start) & (index < end)
        _update_block(
            weights, grads, exp_avgs, exp_avg_sqs, index, inside,
            keep, step_size, root, beta1, rest1, beta2, rest2, eps, factor,
        )  # fmt: skip
