"""Training steps in a bare loop, without the engine: ours, and those of the plain model.

Both train alike, as under DeepSpeed on one GPU: parameters in bf16, gradients gathered in fp32, AdamW on fp32 master
weights and moments, without clipping. Ours leaves what no token of the step may update bitwise alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch

from sgtm.data.batch import Batch
from sgtm.distributed.env import use_deterministic_algorithms
from sgtm.distributed.optim import SegmentedAdamW
from sgtm.distributed.segments import Fragment, segment_tables
from sgtm.measure.models import Setting
from sgtm.measure.plain import Plain
from sgtm.model.rows import live_keys
from sgtm.model.transformer import Transformer
from sgtm_kernels.plan import Tables

Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass(frozen=True)
class AdamW:
    """Section `optimizer`, as far as `SegmentedAdamW` reads it."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    masked_update: str = "exact"


class Mixed(Generic[Model]):
    """Parameters of a model in `dtype`, and by name their fp32 master weights, in whose `.grad` gradients add up."""

    def __init__(self, model: Model, dtype: torch.dtype):
        self.masters = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.model = model.to(dtype)
        self.parameters = dict(model.named_parameters())
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(_gather, self.masters[name]))

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for master in self.masters.values():
            master.grad = None

    def bytes(self, moments: list[torch.Tensor]) -> int:
        """What stays in memory between steps."""
        held = [*self.parameters.values(), *self.masters.values(), *moments]
        return sum(t.numel() * t.element_size() for t in held)


def _gather(master: torch.Tensor, parameter: torch.Tensor) -> None:
    grad = parameter.grad
    assert grad is not None  # autograd has just added to it
    if master.grad is None:
        master.grad = grad.float()
    else:
        master.grad.add_(grad)
    parameter.grad = None


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """As `kernels.deterministic` has it in training, which is the default on CUDA."""
    if device.type == "cuda":
        use_deterministic_algorithms()
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.use_deterministic_algorithms(False)


class Ours:
    """Steps of our model, with batches in the host's memory. One set of weights for all backends and strategies."""

    def __init__(self, setting: Setting, device: torch.device, dtype: torch.dtype):
        self.device = device
        with device:
            self.mixed = Mixed(Transformer(setting.model, setting.partition), dtype)
        rows, masters = self.mixed.model.parameter_rows(), self.mixed.masters
        self.config = AdamW()
        self.loss: torch.Tensor | None = None
        self.optimizer = SegmentedAdamW(masters.values(), self.config, "torch")
        numels = {name: master.numel() for name, master in masters.items()}
        fragments = [Fragment(master, 0, name, 0, master.numel()) for name, master in masters.items()]
        keys = {key for layout in rows.values() for key in layout.keys}
        self.optimizer.set_segments(segment_tables(fragments, numels, rows), keys)

    def step(self, backend: str, tables: Tables, batches: list[Batch]) -> None:
        self._use(backend)
        self.mixed.zero_grad()  # of a step that ran out of memory
        with _deterministic(self.device):
            for batch in batches:
                ids, targets, plan = batch.on(self.device, tables)
                loss, _ = self.mixed.model(ids, targets, plan, 1 / batch.step_targets)
                self.loss = loss
                loss.backward()
        live = live_keys(tables, batches[0].step_labels)
        self.optimizer.begin_step(live, self.config.lr)
        self.optimizer.step()
        parameters, updated = zip(*self._slices(live), strict=True)
        torch._foreach_copy_(parameters, updated)
        self.mixed.zero_grad()

    def _use(self, backend: str) -> None:
        for owner in (self.optimizer, *self.mixed.model.modules()):
            if hasattr(owner, "backend"):
                owner.backend = backend

    def _slices(self, live: frozenset[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(parameter, master) where the master weights have changed."""
        for name, master in self.mixed.masters.items():
            for start, end, key, _ in self.optimizer.tables[master]:
                if key in live:
                    parameter = self.mixed.parameters[name].detach()
                    yield parameter.view(-1)[start:end], master.view(-1)[start:end]

    def bytes(self) -> int:
        return self.mixed.bytes([t for state in self.optimizer.state.values() for t in state.values()])


class PlainSteps:
    """Steps of the plain model, compiled on CUDA, with torch's fused AdamW."""

    def __init__(self, setting: Setting, device: torch.device, dtype: torch.dtype):
        with device:
            self.mixed = Mixed(Plain(setting.model), dtype)
        self.model: Callable = self.mixed.model
        if device.type == "cuda":
            self.model = torch.compile(self.mixed.model, dynamic=False, fullgraph=True)
        masters, config = self.mixed.masters.values(), AdamW()
        groups = [
            {"params": [m for m in masters if m.dim() == 2], "weight_decay": config.weight_decay},
            {"params": [m for m in masters if m.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        self.loss: torch.Tensor | None = None

    def step(self, batches: list[Batch]) -> None:
        self.mixed.zero_grad()
        for batch in batches:
            self.loss = loss = self.model(batch.input_ids, batch.targets, 1 / batch.step_targets)
            loss.backward()
        self.optimizer.step()
        torch._foreach_copy_([p.detach() for p in self.mixed.parameters.values()], list(self.mixed.masters.values()))
        self.mixed.zero_grad()

    def bytes(self) -> int:
        return self.mixed.bytes([t for state in self.optimizer.state.values() for t in state.values()])
