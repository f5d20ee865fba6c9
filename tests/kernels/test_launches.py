"""What the ops launch is what is compiled ahead of time, flag by flag: `variants()` of every op against its calls.

Launches are recorded and not made: what is launched depends on masks and arguments, never on what a kernel computed.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import KernelInterface

from sgtm_kernels.adamw import Update, adamw
from sgtm_kernels.attention import HeadLayout, attention
from sgtm_kernels.cross_entropy import linear_cross_entropy
from sgtm_kernels.embedding import embedding
from sgtm_kernels.linear import linear_in, linear_out, rectangles
from sgtm_kernels.mlp import gelu, linear_gelu, swiglu
from sgtm_kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from sgtm_kernels.plan import JOINT_KINDS, MAX_SLICES, PROJECTIONS, MaskPlan, Tables, merge_label_runs
from sgtm_kernels.tools.aot import all_variants
from sgtm_kernels.tools.launches import KernelVariant, record_launches
from sgtm_kernels.triton_common.tuning import DTYPES

BATCH, SEQ_LEN, WIDTH, BOUNDS = 2, 20, 16, (0, 24, 32)


def tables(active: float, route: float, update: float) -> Tables:
    """Two labels and groups: these are the second label's factors, `update` for the first group and what is joint."""
    forget, retain = ((1.0, 1.0), (update, 1.0)), [((1.0, 1.0), (1.0, value)) for value in (active, route)]
    joint = dict.fromkeys(JOINT_KINDS, (1.0, update))
    return Tables(("a", "b"), ("retain", "b"), *retain, dict.fromkeys(PROJECTIONS, forget), joint)


def plans() -> Iterator[MaskPlan]:
    """Nothing masked, and each table with a mask and with another weight; one label, and one that changes at once."""
    for factors in ((1, 1, 1), (0, 1, 1), (0.5, 1, 1), (1, 0, 1), (1, 0.5, 1), (1, 1, 0), (1, 1, 0.5)):
        masks = tables(*map(float, factors))
        yield MaskPlan.uniform(masks, 1, BATCH, SEQ_LEN)
        runs = merge_label_runs([0, 1] * (BATCH * SEQ_LEN // 2), [1] * (BATCH * SEQ_LEN))
        assert len(runs) > 2 * MAX_SLICES
        yield MaskPlan(masks, runs, BATCH, SEQ_LEN)


Leaf = Callable[..., torch.Tensor]


def leaf_of(dtype: torch.dtype, *shape: int, learns: bool = True) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype).requires_grad_(learns)


def linear(leaf: Leaf, plan: MaskPlan, monkeypatch) -> Iterator[torch.Tensor]:
    wide = leaf(BATCH, SEQ_LEN, BOUNDS[-1])
    for loads, biased in product(("masked", "pointers", "descriptors", "ragged"), (False, True)):
        x = leaf(BATCH, SEQ_LEN, WIDTH // 2) if loads == "ragged" else leaf(BATCH, SEQ_LEN, WIDTH)
        weight = leaf(BOUNDS[-1], x.shape[-1])
        monkeypatch.setenv("SGTM_LINEAR", "masked" if loads == "masked" else "rectangles")
        monkeypatch.setattr(rectangles, "has_descriptors", lambda device, loads=loads: loads == "descriptors")
        bias_in, bias_out = (leaf(n) if biased else None for n in (BOUNDS[-1], x.shape[-1]))
        yield linear_out(wide, weight, bias_out, plan, "mlp_out", BOUNDS, "triton")
        for overwrite in (False, True):
            yield linear_in(x, weight, bias_in, plan, "mlp_in", BOUNDS, "triton", overwrite=overwrite)


def mlp(leaf: Leaf, plan: MaskPlan, monkeypatch) -> Iterator[torch.Tensor]:
    x = leaf(BATCH, SEQ_LEN, BOUNDS[-1])
    yield gelu(x, plan, BOUNDS, "triton")
    yield swiglu(leaf(BATCH, SEQ_LEN, 2 * BOUNDS[-1]), plan, BOUNDS, "triton")
    for learns in (False, True):
        weight, bias = leaf(BOUNDS[-1], BOUNDS[-1]), leaf(BOUNDS[-1], learns=learns)
        yield linear_gelu(x, weight, bias, plan, BOUNDS, "triton")


def attend(leaf: Leaf, plan: MaskPlan, monkeypatch) -> Iterator[torch.Tensor]:
    cuts = tuple((start, start + 10) for start in range(0, plan.tokens, 10))
    cut = MaskPlan(plan.tables, plan.label_runs, plan.batch, plan.seq_len, cuts)
    grouped, alone = HeadLayout((2, 1), (1, 1), 8), HeadLayout((2,), (1,), 8)
    for masks, window, layout in product((plan, cut), (None, 4), (grouped, alone)):
        qkv = leaf(BATCH, SEQ_LEN, 8 * (sum(layout.heads) + 2 * sum(layout.kv_heads)))
        yield attention(qkv, layout, masks, scale=0.5, window=window, backend="triton")
    qkv, rotary = leaf(BATCH, SEQ_LEN, 56), (torch.ones(SEQ_LEN, 8), torch.ones(SEQ_LEN, 8))
    for overwrite in (False, True):
        yield attention(qkv, grouped, plan, scale=0.5, rotary=rotary, overwrite=overwrite, backend="triton")


def norm(leaf: Leaf, plan: MaskPlan, monkeypatch) -> Iterator[torch.Tensor]:
    x = leaf(BATCH, SEQ_LEN, WIDTH)
    for kind, learns in product(("norm", None), (False, True)):
        weight, bias = leaf(WIDTH, learns=learns), leaf(WIDTH, learns=learns)
        yield layer_norm(x, weight, bias, 1e-5, plan, kind, "triton")
        yield rms_norm(x, weight, 1e-5, plan, kind, "triton")
        yield sum(add_layer_norm(x, x, weight, bias, 1e-5, plan, kind, "triton"))
        yield sum(add_rms_norm(x, x, weight, 1e-5, plan, kind, "triton"))


def lookup(leaf: Leaf, plan: MaskPlan, monkeypatch) -> Iterator[torch.Tensor]:
    yield embedding(torch.arange(BATCH * SEQ_LEN).view(BATCH, SEQ_LEN), leaf(50, WIDTH), plan, "embedding", "triton")


def head(leaf: Leaf, plan: MaskPlan, monkeypatch) -> Iterator[torch.Tensor]:
    targets = torch.zeros(BATCH, SEQ_LEN, dtype=torch.int64)
    for learns, bias in ((True, leaf(32)), (True, None), (False, None)):
        x, weight = leaf(BATCH, SEQ_LEN, WIDTH, learns=learns), leaf(32, WIDTH, learns=learns)
        yield linear_cross_entropy(x, weight, bias, targets, plan, 1.0, "triton")[0]


def optimizer(leaf: Leaf, plan: MaskPlan, monkeypatch) -> Iterator[torch.Tensor]:
    weight, *moments = (torch.ones(8) for _ in range(3))
    adamw([Update(weight, leaf(8, learns=False), *moments, 1, 0.1)], 0.1, (0.9, 0.95), 1e-8, "triton")
    yield torch.zeros(())


CALLS: tuple[Callable, ...] = (linear, mlp, attend, norm, lookup, head, optimizer)


def kind(launch: KernelVariant) -> tuple:
    """A kernel with the types of its arguments and its flags; a window is one, whatever its width."""
    flags = {k: v for k, v in launch.constants.items() if isinstance(v, bool)}
    flags |= {"WINDOW": launch.constants["WINDOW"] > 0} if "WINDOW" in launch.constants else {}
    return (
        launch.kernel.__name__,
        tuple(sorted(launch.signature.items())),
        tuple(sorted(flags.items())),
        launch.fp_fusion,
    )


def listed(dtype: torch.dtype) -> set[tuple]:
    """What is compiled ahead of time for a dtype; what has no half precision among its arguments is of fp32."""
    kinds = set()
    for _, _, launch in all_variants():
        types = {*launch.signature.values(), *(f"*{v}" for v in launch.constants.values() if isinstance(v, tl.dtype))}
        if DTYPES[dtype] == next((half for half in ("bf16", "fp16") if f"*{half}" in types), "fp32"):
            kinds.add(kind(launch))
    return kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_launched_is_what_is_compiled_ahead_of_time(dtype, monkeypatch):
    def run() -> None:
        for plan, calls in product(plans(), CALLS):
            for out in calls(partial(leaf_of, dtype), plan, monkeypatch):
                if out.requires_grad:
                    out.backward(torch.ones_like(out))

    made = {kind(launch) for launch in record_launches(run)}
    assert {name for name, *_, fp_fusion in made if not fp_fusion} == {
        "norm_forward", "norm_backward", "norm_sums", "adamw_update",
    }  # fmt: skip
    assert sorted(made - listed(dtype)) == [], "launched, but not compiled ahead of time"
    assert sorted(listed(dtype) - made) == [], "compiled, but never launched"


@triton.jit(do_not_specialize=["loose"])
def kernel(pointer, off, even, odd, one, loose, number, FLAG: tl.constexpr, SIZE: tl.constexpr):
    pass


def test_types_and_alignment_are_those_of_the_arguments():
    x = torch.empty(64, dtype=torch.bfloat16)

    def call(x: torch.Tensor) -> None:
        kernel[(1,)](x, x.int()[1:], 32, 2**40 + 1, 1, 16, 0.5, FLAG=True, SIZE=4, num_warps=8, enable_fp_fusion=False)
        kernel[(1,)](x, x, 32, 33, 34, 16, 1.0, True, SIZE=4, num_stages=2)

    first, second = record_launches(call, x)
    types = {"pointer": "*bf16", "off": "*i32", "even": "i32", "odd": "i64", "loose": "i32", "number": "fp32"}
    assert first.signature == types and first.constants == {"FLAG": True, "SIZE": 4, "one": 1}
    assert set(first.unaligned) == {"off", "odd", "loose"} and not first.fp_fusion
    assert (first.num_warps, first.num_stages, second.num_warps, second.num_stages) == (8, 3, 4, 2)
    assert second.signature["one"] == "i32" and second.constants == {"FLAG": True, "SIZE": 4} and second.fp_fusion


def test_a_call_that_fails_leaves_launches_as_they_were():
    launch = KernelInterface.__getitem__
    with pytest.raises(ZeroDivisionError):
        record_launches(lambda: 1 / 0)
    assert KernelInterface.__getitem__ is launch
