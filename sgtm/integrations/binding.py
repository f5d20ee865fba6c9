"""The plan of a call: from the labels of a micro-batch to the masked modules that compute with them.

A hook on the model takes `sgtm_labels` out of its arguments and makes the micro-batch's plan. Modules read it while
that call lasts. Activation checkpointing runs a layer again inside the backward pass, when the next micro-batch may
have begun: a layer therefore gets its plan as an argument, which the checkpoint keeps with the others, and makes it
current for as long as it runs. What is current belongs to a thread, as backward passes have threads of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from sgtm.integrations.stretches import Owned
from sgtm.masking.labels import LabelSpace
from sgtm.masking.partition import Partition
from sgtm_kernels.plan import MaskPlan, merge_label_runs
from sgtm_kernels.tables import Tables

LABELS = "sgtm_labels"
"""Argument of the model, and column of the data: the applied label of each sequence."""
PLAN = "sgtm_plan"
WRAPPED = "_checkpoint_wrapped_module"
"""Of `torch.distributed.algorithms._checkpoint`, which FSDP and torchtitan put around layers."""


class Binding:
    """What `apply_sgtm` leaves on a model, at `model.sgtm`.

    owned    who owns each parameter, by name
    removed  groups that are inactive, where no labels are in use (`ablate`)
    trained  labels of the forward passes with gradients since the last step of the optimizer
    """

    def __init__(self, space: LabelSpace, tables: Tables, partition: Partition, owned: dict[str, Owned]):
        self.space, self.tables, self.partition, self.owned = space, tables, partition, owned
        self.removed: frozenset[int] = frozenset()
        self.trained: set[int] = set()
        self.stepped = self._handed_over = False
        self._current = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_current"} | {"_handed_over": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _current=threading.local())

    @property
    def plan(self) -> MaskPlan | None:
        return getattr(self._current, "plan", None)

    @contextmanager
    def using(self, plan: MaskPlan | None) -> Iterator[None]:
        """The plan of this thread for as long as it lasts."""
        before, self._current.plan = self.plan, plan
        try:
            yield
        finally:
            self._current.plan = before

    def plan_of(self, module: nn.Module) -> MaskPlan | None:
        """The plan, or None outside training: then the module is the plain one, without the removed groups.

        Raises ValueError where a module in training mode would learn unmasked.
        """
        plan = self.plan
        if plan is None and module.training and torch.is_grad_enabled():
            raise ValueError(
                f"the model is in training mode and got no {LABELS}: pass one label for each sequence (SgtmCollator "
                f"adds them, and Trainer drops the column without SgtmTrainerMixin), or call model.eval()"
            )
        return plan

    @torch.compiler.disable
    def begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook: labels count in training, and are dropped in evaluation mode without gradients."""
        self._hand_over(model)
        kwargs = dict(kwargs)
        labels, self._current.plan, self._current.labels = kwargs.pop(LABELS, None), None, None
        if labels is not None and (model.training or torch.is_grad_enabled()):
            if self.removed:
                raise ValueError("an ablated model cannot be trained with labels: leave `with ablate(...)` first")
            inputs = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
            source = next((x for x in inputs if x is not None), None)
            if source is not None:  # else the model raises
                self._current.labels = label_numbers(labels, self.space)
                self._current.plan = self._plan(self._current.labels, *source.shape[:2])
        return args, kwargs

    def plan_of_part(self, x: torch.Tensor) -> MaskPlan | None:
        """The plan of a part [B, S, ...] of all sequences of the last call, which a loss passes to the head later."""
        labels = getattr(self._current, "labels", None)
        return None if labels is None else self._plan(labels, *x.shape[:2])

    @torch.compiler.disable
    def end(self, model: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook."""
        self._current.plan = None

    def _hand_over(self, model: nn.Module) -> None:
        """Give layers inside a `CheckpointWrapper` their plan from outside, once: it runs them again with its own."""
        if not self._handed_over:
            self._handed_over = True
            for module in model.modules():
                if isinstance(getattr(module, WRAPPED, None), BoundLayer):
                    module.register_forward_pre_hook(_with_plan, with_kwargs=True)

    def groups_of(self, domains: Iterable[str]) -> frozenset[int]:
        """Raises ValueError for an unknown domain."""
        if isinstance(domains, str):
            raise ValueError(f"domains is {domains!r}; give a list, [{domains!r}]")
        return frozenset(self.space.group_of(domain) for domain in domains)

    def _plan(self, labels: list[int], batch: int, seq_len: int) -> MaskPlan:
        if len(labels) != batch:
            raise ValueError(f"{LABELS} has {len(labels)} labels for {batch} sequences; give one for each sequence")
        if torch.is_grad_enabled():
            if self.stepped:
                self.new_step()
            self.trained.update(labels)
        return MaskPlan(self.tables, merge_label_runs(labels, [seq_len] * batch), batch, seq_len)

    def new_step(self) -> None:
        """Forget what has been trained: a step of the optimizer has used it, or has been skipped."""
        self.trained, self.stepped = set(), False

    def without_removed(self, x: torch.Tensor, bounds: Sequence[int]) -> torch.Tensor:
        """x [..., in] with the columns of the removed groups 0."""
        x = x.clone()
        for group in self.removed:
            x[..., bounds[group] : bounds[group + 1]] = 0
        return x


def binding_of(model: nn.Module) -> Binding:
    """The binding of a masked model, also inside DDP or a DeepSpeed engine. Raises ValueError for any other model."""
    return unwrapped(model).sgtm  # type: ignore[return-value]


def unwrapped(model: nn.Module) -> nn.Module:
    """A masked model without DDP, a DeepSpeed engine or `torch.compile`. Raises ValueError for any other model."""
    inner: Any = model
    while not hasattr(inner, "sgtm") and hasattr(inner, "module"):
        inner = inner.module
    inner = getattr(inner, "_orig_mod", inner)  # of torch.compile
    if not isinstance(getattr(inner, "sgtm", None), Binding):
        raise ValueError(f"{type(model).__name__} is not masked; call apply_sgtm(model, masking) first")
    return inner


@contextmanager
def ablate(model: nn.Module, domains: Iterable[str]) -> Iterator[None]:
    """Inside, the model runs without the groups of these domains, wherever no gradients with labels are recorded.

    Raises ValueError for an unknown domain.
    """
    binding = binding_of(model)
    before, binding.removed = binding.removed, binding.groups_of(domains)
    try:
        yield
    finally:
        binding.removed = before


def label_numbers(labels: Any, space: LabelSpace) -> list[int]:
    """Numbers of applied labels, one for each sequence, from names or numbers.

    Numbers in a tensor on a device cost a wait for it: a list or a tuple does not.
    Raises ValueError for unknown labels and for labels of single tokens.
    """
    values = labels.tolist() if isinstance(labels, torch.Tensor) else labels
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ValueError(f"{LABELS} is {values!r}; give one label for each sequence")
    return [label_number(value, space) for value in values]


def label_number(value: Any, space: LabelSpace) -> int:
    """Number of one applied label, given as a name or a number. Raises ValueError for anything else."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str):
        return space.label(value)
    if isinstance(value, (list, tuple)):
        raise ValueError(
            f"{LABELS} has a list of {len(value)} labels for one sequence: labels of single tokens are not supported, "
            f"give one label for each sequence"
        )
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(space.labels):
        known = ", ".join(f"{number} {name}" for number, name in enumerate(space.labels))
        raise ValueError(f"{LABELS} has {value!r}; known labels: {known}")
    return value


class Bound:
    """What a module of the model is masked with; `sgtm` is set before the class is swapped."""

    sgtm: Binding


class PlanArgument:
    """A plan among the arguments of a layer. FSDP2 would rebuild a bare one, as any dataclass, to cast its tensors."""

    def __init__(self, plan: MaskPlan | None):
        self.plan = plan


class BoundLayer(Bound):
    """A transformer layer that takes its plan as an argument (`PLAN`), so that a checkpoint keeps it."""

    def __call__(self, *args, **kwargs):
        kwargs.setdefault(PLAN, PlanArgument(self.sgtm.plan))
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args, **kwargs):
        argument = kwargs.pop(PLAN, None)
        with self.sgtm.using(argument and argument.plan):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def take_off(model: nn.Module) -> None:
    """Make a masked model a plain one in place: its classes, hooks and attributes are as before."""
    for module in model.modules():
        while isinstance(module, Bound):
            module.__class__ = type(module).__bases__[1]
        for name in ("sgtm", "layout", "kind"):
            module.__dict__.pop(name, None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if hook is _with_plan or isinstance(getattr(hook, "__self__", None), Binding):
                    del hooks[number]
                    module._forward_pre_hooks_with_kwargs.pop(number, None)
                    module._forward_hooks_always_called.pop(number, None)


def _with_plan(wrapper: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of a `CheckpointWrapper`."""
    return args, {**kwargs, PLAN: PlanArgument(getattr(wrapper, WRAPPED).sgtm.plan)}


@cache
def swapped(mixin: type, cls: type) -> type:
    """Subclass of a module's class with the name of that class, which Trainer, FSDP and Accelerate look for."""
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
