"""LayerNorm and RMSNorm whose weight and bias learn only from the tokens that may update them; dX is the plain one.

Promise (tests/kernels/test_norm.py): masked tokens contribute exactly nothing to the gradient of weight and bias, and
dX is bit-equal to that of the same op with nothing masked. With a residual the op also returns the sum, which the
rest of the model uses: its gradient is added to dX in the same pass.
"""

from __future__ import annotations

import torch

from sgtm_kernels.dispatch import pick
from sgtm_kernels.plan import MaskPlan, check_known
from sgtm_kernels.signature import backend_of

NORM_KINDS = ("norm", "final_norm", None)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    plan: MaskPlan,
    kind: str | None,
    backend: str = "torch",
) -> torch.Tensor:
    """LayerNorm (Ba et al., 2016) of x [B, S, D], weight and bias [D]. `kind`: `norm`, `final_norm`; None: no mask."""
    _check(x, weight, bias, plan, kind)
    return pick("norm", backend_of(backend, plan, kind)).layer_norm(x, weight, bias, eps, plan, kind)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, plan: MaskPlan, kind: str | None, backend: str = "torch"
) -> torch.Tensor:
    """RMSNorm (Zhang and Sennrich, 2019) of x [B, S, D] with weight [D], computed in at least fp32."""
    _check(x, weight, None, plan, kind)
    return pick("norm", backend_of(backend, plan, kind)).rms_norm(x, weight, eps, plan, kind)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    plan: MaskPlan,
    kind: str | None,
    backend: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + residual, both [B, S, D] of one dtype, rounded to it, and `layer_norm` of the sum."""
    _check(x, weight, bias, plan, kind, residual)
    return pick("norm", backend_of(backend, plan, kind)).add_layer_norm(x, residual, weight, bias, eps, plan, kind)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    plan: MaskPlan,
    kind: str | None,
    backend: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + residual, both [B, S, D] of one dtype, rounded to it, and `rms_norm` of the sum."""
    _check(x, weight, None, plan, kind, residual)
    return pick("norm", backend_of(backend, plan, kind)).add_rms_norm(x, residual, weight, eps, plan, kind)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    plan: MaskPlan,
    kind: str | None,
    residual: torch.Tensor | None = None,
) -> None:
    check_known("kind of norm", kind, NORM_KINDS)
    plan.check(x)
    columns = x.shape[-1:]
    if weight.shape != columns or (bias is not None and bias.shape != columns):
        raise ValueError(f"weight and bias of a norm of {x.shape[-1]} columns must have as many entries")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"a residual of {residual.dtype} {tuple(residual.shape)} for x of {x.dtype} {tuple(x.shape)}: must be alike"
        )
