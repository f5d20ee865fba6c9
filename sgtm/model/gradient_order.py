"""When the gradient of a parameter is complete, where its use depends on the labels of a micro-batch.

ZeRO 2 and 3 reduce gradients in the order in which they are complete. Ranks whose micro-batches have other labels must
have the same order, or the gradients of different parameters are added up, and no error shows it
(tests/unit/test_gradient_order.py).
"""

from __future__ import annotations

import torch


def held(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same tensors; their gradients are complete at once, when that of the activations x is, and are never None."""
    return _Held.apply(x, *parameters)


def awaited(x: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """x, as if it depended on a parameter that gets no gradient by it: the parameter's own is complete after that of x,
    as it is where x does depend on it.
    """
    return _Awaited.apply(x, parameter)


class _Held(torch.autograd.Function):
    """The same tensors. A gradient that does not arrive is one of zeros, as always in a Function."""

    @staticmethod
    def forward(ctx, *tensors):
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


class _Awaited(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, parameter):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return None, None
