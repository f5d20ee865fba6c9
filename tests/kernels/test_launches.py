"""What the ops launch is what is compiled ahead of time, flag by flag: `variants()` of every op against its calls.

Launches are recorded and not made: what is launched depends on masks and arguments, never on what a kernel computed.
"""

from collections.abc import Callable, Iterator
from itertools import product

import torch
import triton.language as tl
from triton.runtime.jit import KernelInterface

from sgtm_kernels.adamw import Update, adamw
from sgtm_kernels.attention import HeadLayout, attention
from sgtm_kernels.cross_entropy import linear_cross_entropy
from sgtm_kernels.embedding import embedding
from sgtm_kernels.linear import linear_in, linear_out, rectangles
from sgtm_kernels.mlp import gelu, linear_gelu, swiglu
from sgtm_kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from sgtm_kernels.plan import JOINT_KINDS, MAX_SLICES, PROJECTIONS, MaskPlan, Tables, merge_runs
from sgtm_kernels.tools.aot import all_variants

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
        runs = merge_runs([0, 1] * (BATCH * SEQ_LEN // 2), [1] * (BATCH * SEQ_LEN))
        assert len(runs) > 2 * MAX_SLICES
        yield MaskPlan(masks, runs, BATCH, SEQ_LEN)


def leaf(*shape: int, learns: bool = True) -> torch.Tensor:
    return torch.ones(shape).requires_grad_(learns)


def linear(plan: MaskPlan, monkeypatch) -> Iterator[torch.Tensor]:
    wide = leaf(BATCH, SEQ_LEN, BOUNDS[-1])
    for way, biased in product(("masked", "pointers", "descriptors", "ragged"), (False, True)):
        x = leaf(BATCH, SEQ_LEN, WIDTH // 2) if way == "ragged" else leaf(BATCH, SEQ_LEN, WIDTH)
        weight = leaf(BOUNDS[-1], x.shape[-1])
        monkeypatch.setenv("SGTM_LINEAR", "masked" if way == "masked" else "rectangles")
        monkeypatch.setattr(rectangles, "has_descriptors", lambda device, way=way: way == "descriptors")
        bias_in, bias_out = (leaf(n) if biased else None for n in (BOUNDS[-1], x.shape[-1]))
        yield linear_out(wide, weight, bias_out, plan, "mlp_out", BOUNDS, "triton")
        for overwrite in (False, True):
            yield linear_in(x, weight, bias_in, plan, "mlp_in", BOUNDS, "triton", overwrite=overwrite)


def mlp(plan: MaskPlan, monkeypatch) -> Iterator[torch.Tensor]:
    x = leaf(BATCH, SEQ_LEN, BOUNDS[-1])
    yield gelu(x, plan, BOUNDS, "triton")
    yield swiglu(leaf(BATCH, SEQ_LEN, 2 * BOUNDS[-1]), plan, BOUNDS, "triton")
    for learns in (False, True):
        weight, bias = leaf(BOUNDS[-1], BOUNDS[-1]), leaf(BOUNDS[-1], learns=learns)
        yield linear_gelu(x, weight, bias, plan, BOUNDS, "triton")


def attend(plan: MaskPlan, monkeypatch) -> Iterator[torch.Tensor]:
    cuts = tuple((start, start + 10) for start in range(0, plan.tokens, 10))
    cut = MaskPlan(plan.tables, plan.runs, plan.batch, plan.seq_len, cuts)
    grouped, alone = HeadLayout((2, 1), (1, 1), 8), HeadLayout((2,), (1,), 8)
    for masks, window, layout in product((plan, cut), (None, 4), (grouped, alone)):
        qkv = leaf(BATCH, SEQ_LEN, 8 * (sum(layout.heads) + 2 * sum(layout.kv_heads)))
        yield attention(qkv, layout, masks, scale=0.5, window=window, backend="triton")
    qkv, rotary = leaf(BATCH, SEQ_LEN, 56), (torch.ones(SEQ_LEN, 8), torch.ones(SEQ_LEN, 8))
    for overwrite in (False, True):
        yield attention(qkv, grouped, plan, scale=0.5, rotary=rotary, overwrite=overwrite, backend="triton")


def norm(plan: MaskPlan, monkeypatch) -> Iterator[torch.Tensor]:
    x = leaf(BATCH, SEQ_LEN, WIDTH)
    for kind, learns in product(("norm", None), (False, True)):
        weight, bias = leaf(WIDTH, learns=learns), leaf(WIDTH, learns=learns)
        yield layer_norm(x, weight, bias, 1e-5, plan, kind, "triton")
        yield rms_norm(x, weight, 1e-5, plan, kind, "triton")
        yield sum(add_layer_norm(x, x, weight, bias, 1e-5, plan, kind, "triton"))
        yield sum(add_rms_norm(x, x, weight, 1e-5, plan, kind, "triton"))


def lookup(plan: MaskPlan, monkeypatch) -> Iterator[torch.Tensor]:
    yield embedding(torch.arange(BATCH * SEQ_LEN).view(BATCH, SEQ_LEN), leaf(50, WIDTH), plan, "embedding", "triton")


def head(plan: MaskPlan, monkeypatch) -> Iterator[torch.Tensor]:
    targets = torch.zeros(BATCH, SEQ_LEN, dtype=torch.int64)
    for learns, bias in ((True, leaf(32)), (True, None), (False, None)):
        x, weight = leaf(BATCH, SEQ_LEN, WIDTH, learns=learns), leaf(32, WIDTH, learns=learns)
        yield linear_cross_entropy(x, weight, bias, targets, plan, 1.0, "triton")[0]


def optimizer(plan: MaskPlan, monkeypatch) -> Iterator[torch.Tensor]:
    adamw([Update(*(torch.ones(8) for _ in range(4)), 1, 0.1)], 0.1, (0.9, 0.95), 1e-8, "triton")
    yield torch.zeros(())


CALLS: tuple[Callable, ...] = (linear, mlp, attend, norm, lookup, head, optimizer)


def launched(name: str, constants: dict[str, object], fp_fusion: bool) -> tuple:
    """A kernel with its flags; a window is one, whatever its width."""
    flags = {k: v for k, v in constants.items() if isinstance(v, bool)}
    flags |= {"WINDOW": constants["WINDOW"] > 0} if "WINDOW" in constants else {}
    return name, tuple(sorted(flags.items())), fp_fusion


def listed(dtype: str) -> set[tuple]:
    """What is compiled ahead of time for a dtype; what has no half precision among its arguments is of fp32."""
    found = set()
    for _, _, launch in all_variants():
        kinds = {*launch.signature.values(), *(f"*{v}" for v in launch.constants.values() if isinstance(v, tl.dtype))}
        if dtype == next((half for half in ("bf16", "fp16") if f"*{half}" in kinds), "fp32"):
            found.add(launched(launch.kernel.__name__, launch.constants, launch.fp_fusion))
    return found


def test_what_is_launched_is_what_is_compiled_ahead_of_time(monkeypatch):
    made = set()

    def recorded(kernel, grid):
        def launch(*args, **kwargs):
            constants = {k: v for k, v in kwargs.items() if k in kernel.arg_names}
            made.add(launched(kernel.__name__, constants, kwargs.get("enable_fp_fusion", True)))

        return launch

    monkeypatch.setattr(KernelInterface, "__getitem__", recorded)
    for plan, calls in product(plans(), CALLS):
        for out in calls(plan, monkeypatch):
            if out.requires_grad:
                out.backward(torch.ones_like(out))
    exact = {name for name, _, fp_fusion in made if not fp_fusion}
    assert exact == {"norm_forward", "norm_backward", "norm_sums", "adamw_update"}
    for dtype in ("fp32", "bf16"):
        assert made - listed(dtype) == set(), f"launched, but in {dtype} not compiled ahead of time"
        assert listed(dtype) - made == set(), f"compiled in {dtype}, but never launched"
