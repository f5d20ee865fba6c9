"""One definition of an op's forward and backward pass, run in two ways.

Eagerly an op is a plain `torch.autograd.Function` that calls its kernels. Where a graph is captured it is a node of
that graph, an op of torch's dispatcher, which costs several times as much Python per call (benchmarks/host.py).

An op's inputs are its tensors, the plan, then numbers: `forward(*tensors, plan, *numbers)` returns one tensor or a
tuple. The dispatcher's op takes the plan's handle in the plan's place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def captured() -> bool:
    """Whether a graph is being captured: then ops must be the dispatcher's."""
    return torch.compiler.is_compiling()


def eager(forward: Callable, keep: Callable, backward: Callable, outputs: tuple[int, int] | None = (1, 1)) -> Callable:
    """The op as an autograd function: called like `forward`, with a `MaskPlan`.

    forward   (*tensors, plan, *numbers) -> tensor, or a tuple of tensors (None: absent)
    keep      (inputs, outputs) -> tensors to save, the plan, numbers. A parameter is saved itself, never a view of it:
              under ZeRO-3 it is gathered again before the backward pass
    backward  (*dys, *tensors saved, plan, *numbers, wanted) -> gradients of the first inputs, None where there is none;
              `wanted`: for each input, whether it needs one
    outputs   how many of the outputs of `forward` have a gradient, and how many are returned: the first ones; None: all
    """
    differentiable, returned = outputs or (None, None)

    def gradients(ctx, *dys):
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled():
            raise RuntimeError("the masked ops have no second derivative: call backward without create_graph")
        dxs = backward(*dys[:differentiable], *ctx.saved_tensors, ctx.plan, *ctx.numbers, wanted)
        return dxs + (None,) * (len(wanted) - len(dxs))

    def run(ctx, *inputs):
        result = forward(*inputs)
        tensors, ctx.plan, ctx.numbers = keep(inputs, result)
        ctx.save_for_backward(*tensors)
        if not isinstance(result, tuple):
            return result
        if returned != differentiable:
            ctx.mark_non_differentiable(*result[differentiable:returned])
            ctx.set_materialize_grads(False)
        return result[0] if returned == 1 else result[:returned]

    name = forward.__module__.removeprefix("sgtm_kernels.")
    members = {"forward": staticmethod(run), "backward": staticmethod(gradients)}
    Eager = type(name, (torch.autograd.Function,), members)  # a node of the graph has its op's name
    assert issubclass(Eager, torch.autograd.Function)
    # Without a third of its cost, which is for functorch. torch's stub of the base class lacks it.
    apply = super(torch.autograd.Function, Eager).apply  # type: ignore[misc]

    def call(*inputs):
        if torch.is_grad_enabled():
            return (Eager.apply if torch._C._are_functorch_transforms_active() else apply)(*inputs)
        result = forward(*inputs)
        if not isinstance(result, tuple):
            return result
        return result[0] if returned == 1 else result[:returned]

    return call


def register(op, keep: Callable, backward: Callable, differentiable: int = 1) -> None:
    """Give an op of the dispatcher (`torch.library.custom_op`) its gradient, which `backward` calls another op for.

    keep, backward  as in `eager`, with the handle in the plan's place; `backward` may return unwanted tensors
    """

    def setup_context(ctx, inputs, output):
        tensors, handle, ctx.numbers = keep(inputs, output)
        if isinstance(output, tuple) and len(output) > differentiable:
            ctx.mark_non_differentiable(*output[differentiable:])
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, handle)

    def gradients(ctx, *dys):
        wanted = ctx.needs_input_grad
        dxs = backward(*dys[:differentiable], *ctx.saved_tensors, *ctx.numbers, wanted)
        dxs = tuple(dx if want else None for dx, want in zip(dxs, wanted, strict=False))
        return *dxs, *(None,) * (len(wanted) - len(dxs))

    op.register_autograd(gradients, setup_context=setup_context)


def existing(like: torch.Tensor, *results: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The results of an op of the dispatcher, which returns tensors only: an empty one for each None."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in results)
