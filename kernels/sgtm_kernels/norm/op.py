"""LayerNorm and RMSNorm whose weight and bias learn only from the tokens that may update them; dX is the plain one.

Promise (tests/kernels/test_norm.py): masked tokens contribute exactly nothing to the gradient of weight and bias, and
dX is bit-equal to that of the same op with nothing masked.
"""

from __future__ import annotations

import torch

from sgtm_kernels.dispatch import pick
from sgtm_kernels.plan import MaskPlan, known
from sgtm_kernels.signature import backend_of

KINDS = ("norm", "final_norm", None)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    plan: MaskPlan,
    kind: str | None,
    backend: str = "runs",
) -> torch.Tensor:
    """LayerNorm (Ba et al., 2016) of x [B, S, D], weight and bias [D]. `kind`: `norm`, `final_norm`; None: no mask."""
    _check(x, weight, bias, plan, kind)
    return pick("norm", backend_of(backend, plan, kind)).layer_norm(x, weight, bias, eps, plan, kind)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, plan: MaskPlan, kind: str | None, backend: str = "runs"
) -> torch.Tensor:
    """RMSNorm (Zhang and Sennrich, 2019) of x [B, S, D] with weight [D], computed in at least fp32."""
    _check(x, weight, None, plan, kind)
    return pick("norm", backend_of(backend, plan, kind)).rms_norm(x, weight, eps, plan, kind)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, plan: MaskPlan, kind: str | None) -> None:
    known("kind of norm", kind, KINDS)
    plan.check(x)
    columns = x.shape[-1:]
    if weight.shape != columns or (bias is not None and bias.shape != columns):
        raise ValueError(f"weight and bias of a norm of {x.shape[-1]} columns must have as many entries")
