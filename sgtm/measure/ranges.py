"""Named ranges in a trace: the phases of a step and the modules of the model, forward and backward.

Nothing of this is in the code that trains: an engine of its own names the phases, and the modules of one model are
wrapped. In the backward pass every autograd node that a module's forward has made is a range of its own, called
`<module> backward`. What a checkpointed block recomputes there keeps the module's own name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps

import torch
from torch.profiler import record_function

from sgtm.distributed.engine import Engine
from sgtm.model.transformer import MLP, Attention, Norm, Transformer

FORWARD, BACKWARD, OPTIMIZER = PHASES = "forward", "backward", "optimizer"
MODULES = "embedding", "norm", "attention", "mlp", "loss"
OF_BACKWARD = " backward"
_NAMES = {Norm: "norm", Attention: "attention", MLP: "mlp"}


class RangedEngine(Engine):
    """The engine, whose three calls are the ranges `forward`, `backward` and `optimizer` (reductions and clipping that
    DeepSpeed does in a call belong to it)."""

    def __call__(self, *args, **kwargs):
        with record_function(FORWARD):
            return super().__call__(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        with record_function(BACKWARD):
            super().backward(loss)

    def step(self, live: frozenset[str], lr: float, measure: bool = False) -> None:
        with record_function(OPTIMIZER):
            super().step(live, lr, measure)


def name_modules(model: Transformer) -> None:
    """From now on every forward and backward pass of this model has ranges; call it before the engine takes it.

    A compiled block has none inside: a range would break its graph.
    """
    for name, method in (("embedding", "embed"), ("loss", "loss")):
        setattr(model, method, ranged(name, getattr(model, method)))
    if model.compiled:
        return
    for module in model.modules():
        if type(module) in _NAMES:
            module.forward = ranged(_NAMES[type(module)], module.forward)


def ranged(name: str, forward: Callable) -> Callable:
    """`forward`, as a range of this name, and the nodes it makes as ranges of the backward pass."""

    @wraps(forward)
    def within(*args):
        with record_function(name):
            result = forward(*args)
        outputs = result if isinstance(result, tuple) else (result,)
        for node in _nodes(outputs, until=args):
            _name_node(node, name + OF_BACKWARD)
        return result

    return within


def _nodes(outputs: Iterable, until: Iterable) -> Iterator[torch.autograd.graph.Node]:
    """The autograd nodes between inputs and outputs. Parameters' own are left out: what runs there is the engine's."""
    seen = set(_grad_fns(until))
    waiting: list[torch.autograd.graph.Node | None] = [*_grad_fns(outputs)]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node.name().endswith("AccumulateGrad"):
            continue
        seen.add(node)
        waiting += [after for after, _ in node.next_functions]
        yield node


def _grad_fns(values: Iterable) -> list[torch.autograd.graph.Node]:
    nodes = (value.grad_fn for value in values if isinstance(value, torch.Tensor))
    return [node for node in nodes if node is not None]


def _name_node(node: torch.autograd.graph.Node, name: str) -> None:
    opened = record_function(name)
    node.register_prehook(lambda grad_outputs: opened.__enter__() and None)
    node.register_hook(lambda grad_inputs, grad_outputs: opened.__exit__(None, None, None))
