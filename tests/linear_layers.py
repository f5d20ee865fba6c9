"""Masked linear layers as their tests make them: the sides, their algorithms, and inputs."""

import pytest
import torch

from sgtm_kernels.linear import linear_in, linear_out, rectangles
from sgtm_kernels.testing import random_like

BOUNDS = (
    0,
    24,
    40,
    48,
)  # 48 rows in three groups: more than columns, as many, fewer; multiples of 16, as descriptors need
WIDTH = 16
SIDES = {"in": (linear_in, "mlp_in", WIDTH, BOUNDS[-1]), "out": (linear_out, "attn_out", BOUNDS[-1], WIDTH)}

by_side = pytest.mark.parametrize("side", SIDES)
# Backends and, for labels that change from token to token, the algorithms of `triton` (see `use_algorithm`).
KERNELS = ("triton", "rectangles", "descriptors")
FAST = ("torch", *KERNELS)

by_kernel = pytest.mark.parametrize("backend", KERNELS)


def use_algorithm(request, monkeypatch) -> None:
    """`rectangles` and `descriptors` are the backend `triton` with that algorithm, on masks or on descriptors."""
    backend = getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend")
    monkeypatch.setenv("SGTM_LINEAR", "masked" if backend == "triton" else "rectangles")
    monkeypatch.setattr(rectangles, "has_descriptors", lambda device: backend == "descriptors")


def inputs(side: str, batch: int, seq_len: int, dtype=torch.float64) -> list[torch.Tensor]:
    """x, weight, bias: the same values in every dtype, exact in bf16."""
    _, _, x_width, y_width = SIDES[side]
    shapes = [(batch, seq_len, x_width), (BOUNDS[-1], WIDTH), (y_width,)]
    return [random_like(torch.empty(shape, dtype=torch.bfloat16), i).to(dtype) for i, shape in enumerate(shapes)]


def op(side: str, plan, backend: str, bounds=BOUNDS, **options):
    function, part, *_ = SIDES[side]
    name = "triton" if backend in KERNELS else backend
    return lambda x, weight, bias=None: function(x, weight, bias, plan, part, bounds, name, **options)


def gradients(side, plan, backend, x, weight, bias, dy) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    return torch.autograd.grad(op(side, plan, backend)(x, weight, bias), (weight, bias), dy)
