"""The MLP's non-linearity with `active` and `route` per label and group.

Promises (tests/kernels/test_mlp.py): an inactive neuron's output, and the gradient at its pre-activation, are exactly
0; `route` leaves the forward value bit for bit and scales only what flows back; where both are 1 it is the plain op.
"""

from __future__ import annotations

import torch

from sgtm_kernels.dispatch import pick
from sgtm_kernels.plan import MaskPlan
from sgtm_kernels.signature import backend_of


def gelu(x: torch.Tensor, plan: MaskPlan, bounds: tuple[int, ...], backend: str = "torch") -> torch.Tensor:
    """tanh-GELU (Hendrycks and Gimpel, 2016), x [B, S, F] -> [B, S, F]; `bounds`: group boundaries in the neurons."""
    plan.check(x)
    plan.check_bounds(bounds, x.shape[-1])
    return pick("mlp", backend_of(backend, plan, *_masks(bounds, "outputs"))).gelu(x, plan, bounds)


def swiglu(x: torch.Tensor, plan: MaskPlan, bounds: tuple[int, ...], backend: str = "torch") -> torch.Tensor:
    """SwiGLU (Shazeer, 2020): silu(gate) * up, x [B, S, 2F] -> [B, S, F].

    The 2F columns hold, for each group, its gates and then its ups; `bounds`: group boundaries in the F neurons.
    """
    plan.check(x)
    plan.check_bounds(bounds, x.shape[-1] // 2)
    return pick("mlp", backend_of(backend, plan, *_masks(bounds, "outputs"))).swiglu(x, plan, bounds)


def linear_gelu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    plan: MaskPlan,
    bounds: tuple[int, ...],
    backend: str = "torch",
) -> torch.Tensor:
    """`gelu` of `linear_in(x, weight, bias)`, projection `mlp_in`: x [B, S, in], weight [F, in], bias [F] -> [B, S, F].

    As one op, a kernel can sum the bias's gradient in the backward pass of the activation.
    """
    plan.check_product(x, bias, weight.shape[1], weight.shape[0])
    plan.check_bounds(bounds, weight.shape[0])
    return pick("mlp", backend_of(backend, plan, *_masks(bounds, "mlp_in", "outputs"))).linear_gelu(
        x, weight, bias, plan, bounds
    )


def _masks(bounds: tuple[int, ...], *what: str) -> tuple[str, ...]:
    """What of a plan masks the op: nothing where there is one group."""
    return what if len(bounds) > 2 else ()
