"""Masked linear layers: the gradient of a group's rows takes only the tokens that may update it; dX is the plain one.

`linear_in` has its groups on the output side (`w_qkv`, `w_in`; weight [rows, in]), `linear_out` on the input side
(`w_o`, `w_out`; weight stored input-major [rows, out]), so that in both a group is a row range. Promises
(tests/kernels/test_linear.py): rows that no token may update have a gradient of exactly 0; dX is bit-equal to that of
`torch.nn.functional.linear`; dW of the retain rows does not change with the content of forget tokens.
"""

from __future__ import annotations

import torch

from sgtm_kernels.dispatch import pick
from sgtm_kernels.plan import MaskPlan, check_known
from sgtm_kernels.signature import backend_of


def linear_in(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    plan: MaskPlan,
    projection: str,
    bounds: tuple[int, ...],
    backend: str = "torch",
    *,
    overwrite: bool = False,
) -> torch.Tensor:
    """x [B, S, in] @ weight [rows, in]^T + bias [rows] -> [B, S, rows].

    projection  `attn_in` or `mlp_in`: which `update` table holds. The bias belongs to the rows.
    bounds      group boundaries in the rows; two entries mean no groups: nothing is masked
    overwrite   whether the backward pass may write to the gradient of the result: only where a single op uses the
                result, that op makes a new tensor of its gradient (an activation or attention does; an addition hands
                on the tensor that its other input gets too), and nothing looks at it later (`retain_grad`, a hook,
                `autograd.grad` with respect to the result)
    """
    check_known("projection of linear_in", projection, ("attn_in", "mlp_in"))
    plan.check_product(x, bias, weight.shape[1], weight.shape[0])
    plan.check_bounds(bounds, weight.shape[0])
    op = pick("linear", backend_of(backend, plan, projection))
    return op.linear_in(x, weight, bias, plan, projection, bounds, overwrite)


def linear_out(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    plan: MaskPlan,
    projection: str,
    bounds: tuple[int, ...],
    backend: str = "torch",
) -> torch.Tensor:
    """x [B, S, rows] @ weight [rows, out] + bias [out] -> [B, S, out].

    projection  `attn_out` or `mlp_out`. The bias is joint, of kind `<projection>_bias`.
    bounds      group boundaries in the rows; two entries mean no groups: nothing is masked, the bias neither
    """
    check_known("projection of linear_out", projection, ("attn_out", "mlp_out"))
    plan.check_product(x, bias, weight.shape[0], weight.shape[1])
    plan.check_bounds(bounds, weight.shape[0])
    op = pick("linear", backend_of(backend, plan, projection))
    return op.linear_out(x, weight, bias, plan, projection, bounds)
