"""AdamW in one Triton launch for all slices of a call.

A table with one row for each slice (addresses, first and last element, bias corrections, decay) is built on the CPU and
copied without waiting. A program finds its slice by its number and updates one block of it, so that memory of slices
that are not passed is never read or written. Slices that begin at the same distance from a 16-byte border in all four
tensors, as views of flat partitions do, are cut into blocks at such borders and moved 16 bytes at a time.

Division and square root are rounded correctly and multiplications and additions are not contracted: the new value of an
element depends on nothing but its old values and the slice's numbers, on any device.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from sgtm_kernels.launch import Launch

BLOCK = 1024  # elements
BORDER = 4  # elements of fp32 between 16-byte borders
FIELDS = tl.constexpr(10)  # int64 of a row: 4 addresses, first element, end, first block, aligned, 4 x fp32 in the rest
GRADS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def adamw(updates, lr, betas, eps):
    by_dtype: dict[torch.dtype, list] = {}
    for update in updates:
        if update.weight.numel():
            by_dtype.setdefault(update.grad.dtype, []).append(update)
    for dtype, group in by_dtype.items():
        table, blocks = segment_table(group, lr, betas)
        device = group[0].weight.device
        table = (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)
        (beta1, beta2), segments = betas, len(group)
        adamw_update[(blocks,)](
            table, table.view(torch.float32), segments, segments.bit_length(), beta1, 1 - beta1, beta2, 1 - beta2, eps,
            GRAD=GRADS[dtype], BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip


def segment_table(updates, lr: float, betas: tuple[float, float]) -> tuple[torch.Tensor, int]:
    """The table of these slices, int64 [slices, FIELDS] on the CPU, and their number of blocks.

    Raises ValueError for a tensor that is not of the documented dtype, not contiguous or of another length.
    """
    places, numbers, blocks = [], [], 0
    for update in updates:
        tensors = update[:4]
        _check(tensors)
        addresses = [t.data_ptr() for t in tensors]
        sizes = [t.element_size() for t in tensors]
        shifts = {address // size % BORDER for address, size in zip(addresses, sizes, strict=True)}
        aligned = len(shifts) == 1 and all(a % size == 0 for a, size in zip(addresses, sizes, strict=True))
        shift = shifts.pop() if aligned else 0
        addresses = [address - shift * size for address, size in zip(addresses, sizes, strict=True)]
        end = shift + tensors[0].numel()
        places.append([*addresses, shift, end, blocks, int(aligned)])
        step_size = lr / (1 - betas[0] ** update.step)
        numbers.append([1 - lr * update.decay, step_size, math.sqrt(1 - betas[1] ** update.step), 0.0])
        blocks += triton.cdiv(end, BLOCK)
    numbers = torch.tensor(numbers, dtype=torch.float32, device="cpu").view(torch.int64)
    return torch.cat([torch.tensor(places, dtype=torch.int64, device="cpu"), numbers], dim=1), blocks


def _check(tensors) -> None:
    weight, grad, *moments = tensors
    if any(t.dtype != torch.float32 for t in (weight, *moments)) or grad.dtype not in GRADS:
        raise ValueError(f"AdamW's kernel needs fp32 weights and moments, got {[t.dtype for t in tensors]}")
    if any(t.numel() != weight.numel() or not t.is_contiguous() or t.device != weight.device for t in tensors):
        raise ValueError("the tensors of a slice must be contiguous, of one length and on one device")


@triton.jit
def _update_block(
    weights, grads, exp_avgs, exp_avg_sqs, at, inside, keep, step_size, root, beta1, rest1, beta2, rest2, eps
):  # fmt: skip
    grad = tl.load(grads + at, mask=inside).to(tl.float32)
    m = tl.load(exp_avgs + at, mask=inside) * beta1 + grad * rest1
    v = tl.load(exp_avg_sqs + at, mask=inside) * beta2 + grad * grad * rest2
    step = step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    tl.store(weights + at, tl.load(weights + at, mask=inside) * keep - step, mask=inside)
    tl.store(exp_avgs + at, m, mask=inside)
    tl.store(exp_avg_sqs + at, v, mask=inside)


@triton.jit(do_not_specialize=["segments", "halvings"])
def adamw_update(
    table, numbers, segments, halvings, beta1, rest1, beta2, rest2, eps, GRAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """table, numbers: the same memory, as int64 and as fp32."""
    block = tl.program_id(0)
    low = block * 0
    high = low + segments
    for _ in range(halvings):  # the last slice whose first block is not behind this one
        middle = (low + high) // 2
        here = tl.load(table + middle * FIELDS + 6) <= block
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle)
    row = table + low * FIELDS
    weights = tl.load(row).to(tl.pointer_type(tl.float32))
    grads = tl.load(row + 1).to(tl.pointer_type(GRAD))
    exp_avgs = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    exp_avg_sqs = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    start, end = tl.load(row + 4), tl.load(row + 5)
    offset = (block - tl.load(row + 6)) * BLOCK
    aligned = tl.load(row + 7) != 0
    keep = tl.load(numbers + low * (2 * FIELDS) + 16)
    step_size = tl.load(numbers + low * (2 * FIELDS) + 17)
    root = tl.load(numbers + low * (2 * FIELDS) + 18)
    at = offset + tl.arange(0, BLOCK)
    if aligned & (offset >= start) & (offset + BLOCK <= end):
        weights = tl.multiple_of(weights, 16)
        grads = tl.multiple_of(grads, 4 * GRAD.primitive_bitwidth // 8)
        exp_avgs = tl.multiple_of(exp_avgs, 16)
        exp_avg_sqs = tl.multiple_of(exp_avg_sqs, 16)
        _update_block(
            weights, grads, exp_avgs, exp_avg_sqs, at, None, keep, step_size, root, beta1, rest1, beta2, rest2, eps
        )  # fmt: skip
    else:
        inside = (at >= start) & (at < end)
        _update_block(
            weights, grads, exp_avgs, exp_avg_sqs, at, inside, keep, step_size, root, beta1, rest1, beta2, rest2, eps
        )  # fmt: skip


def launches() -> list[Launch]:
    """Every dtype of a gradient, for the ahead-of-time suite."""
    numbers = dict.fromkeys(("beta1", "rest1", "beta2", "rest2", "eps"), "fp32")
    signature = {"table": "*i64", "numbers": "*fp32", "segments": "i32", "halvings": "i32"} | numbers
    return [
        Launch(
            adamw_update,
            signature,
            {"GRAD": grad, "BLOCK": BLOCK},
            unaligned=("segments", "halvings"),
            fp_fusion=False,
            narrow=None,
            programs=8,  # slices begin anywhere
        )
        for grad in GRADS.values()
    ]
