"""AdamW that leaves what a step may not update bitwise alone.

DeepSpeed hands an optimizer flat fp32 partitions, in which a weight's rows can begin and end anywhere. A *segment
table* (sgtm/distributed/segments.py) lists which elements of such a tensor belong to which key (sgtm/model/rows.py);
padding belongs to none. Each step names the keys that are live. With `masked_update: exact`, a key that is not live
keeps its weights, both moments and its own step count; with `zero_grad` every key is updated with whatever gradient it
has, so that decay and stale momentum move masked weights, as in the reference implementation of the paper.

tests/dist/test_freeze.py holds this in every ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from sgtm_kernels.adamw import Tensors, WeightSlice, prepare
from sgtm_kernels.adamw.op import Step

PREPARED = 64  # live sets whose launches are kept; a run has as many as its steps have mixtures of labels


class Segment(NamedTuple):
    """Elements `start:end` of a flattened tensor of the optimizer; all have one key."""

    start: int
    end: int
    key: str
    decay: bool


class Settings(Protocol):
    """What is read of the `optimizer` section; sgtm/measure/bare.py has no pydantic and brings its own."""

    @property
    def lr(self) -> float: ...

    @property
    def betas(self) -> tuple[float, float]: ...

    @property
    def eps(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def masked_update(self) -> str: ...


class Prepared(NamedTuple):
    """The update of live segments of one owner and rate: the call, the keys whose counts it takes, and the tensors'
    state."""

    update: Step
    keys: list[str]
    states: list[dict[str, torch.Tensor]]


class SegmentedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) over segments of the tensors that DeepSpeed makes of the parameters.

    config   `optimizer` section: betas, eps, weight_decay, masked_update; lr comes with each step
    backend  resolved kernel backend
    tables   segments of every tensor this rank owns a part of, by tensor
    steps    number of updates each key has had; the same on all ranks, part of a checkpoint
    owners   by key, the number of those who clip and skip together; 0 for all unless `set_segments` was given others
    rates    by key, what the learning rate is multiplied by; 1 for all unless `set_segments` was given others
    factors  by owner, what the gradient of the coming `step` is multiplied by, an fp32 number up to 1 (clipping), or
             None: its keys are not updated, as if they were not live. 1.0 unless set after `begin_step`. The backend
             `torch` then multiplies the gradient of live segments in place.
    squares  after a step with `measure`: sum of squares of this rank's gradient by key, in order of `steps`, before
             `factors` (and also of keys that are not live); fp64 [keys]; else None

    State of a tensor: `exp_avg` and `exp_avg_sq`, fp32, of its shape (names known to DeepSpeed's universal checkpoint).
    """

    def __init__(self, params: Iterable[torch.Tensor], config: Settings, backend: str):
        super().__init__(params, {"lr": config.lr, "betas": config.betas, "eps": config.eps})
        self.config = config
        self.backend = backend
        self.steps: dict[str, int] = {}
        self.owners: dict[str, int] = {}
        self.rates: dict[str, float] = {}
        self.factors: list[float | None] = [1.0]
        self.tables: dict[torch.Tensor, list[Segment]] = {}
        self.squares: torch.Tensor | None = None
        self._live: frozenset[str] = frozenset()
        self._counted = True
        self._parts: list[tuple[int, float]] = []  # owner and rate: a launch takes one of each
        self._prepared: dict[tuple, Prepared] = {}
        self._known = self.state  # that `_prepared` holds entries of

    def set_segments(
        self,
        tables: dict[torch.Tensor, list[Segment]],
        keys: Iterable[str],
        owners: Mapping[str, int] | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        """Segment tables of this rank's tensors, and every key of the model (other ranks may own some alone).

        The moments are allocated here, so that a run that will not fit in memory fails before its first step.
        """
        self.tables = tables
        self.steps = dict.fromkeys(sorted(keys), 0)
        self.owners = dict(owners) if owners else dict.fromkeys(self.steps, 0)
        self.rates = dict(rates) if rates else dict.fromkeys(self.steps, 1.0)
        self._parts = sorted({(self.owners[key], self.rates[key]) for key in self.steps})
        self._prepared.clear()
        for tensor in tables:
            self.state[tensor] = {"exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}

    def begin_step(self, live: frozenset[str], lr: float, measure: bool = False) -> None:
        """Which keys the coming step updates, and its learning rate. No live key at all: nothing is updated.

        measure  whether `squares` is wanted; it costs one more pass over the gradient

        The counts advance with the first call of `step`: DeepSpeed calls it once for each of its groups, and not at all
        where the gradient is not finite.
        """
        everything = live and self.config.masked_update == "zero_grad"
        self._live = frozenset(self.steps) if everything else live.intersection(self.steps)
        self._counted = False
        self.factors = [1.0] * (max(self.owners.values(), default=0) + 1)
        device = next(iter(self.tables)).device if self.tables else None
        self.squares = torch.zeros(len(self.steps), dtype=torch.float64, device=device) if measure else None
        for group in self.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # DeepSpeed computes the gradient
        """Update the live segments of the tensors now in `param_groups` (ZeRO-3 puts one in at a time)."""
        if not self._counted:
            self._counted = True
            self._live = frozenset(key for key in self._live if self.factors[self.owners[key]] is not None)
            for key in self._live:
                self.steps[key] += 1
        for group in self.param_groups:
            params = [(tensor, tensor.grad) for tensor in group["params"]]
            tensors = [tensor for tensor, grad in params if grad is not None]
            grads = [grad for _, grad in params if grad is not None]
            if self.squares is not None:
                self._measure(self.squares, tensors, grads)
            for owner, rate in self._parts:
                factor = self.factors[owner]
                if factor is None:
                    continue
                update, keys, states = self._update_of(tensors, owner, rate)
                moments = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
                parts = list(map(Tensors._make, zip(tensors, grads, *moments, strict=True)))
                update(parts, [self.steps[key] for key in keys], group["lr"] * rate, factor)

    def _update_of(self, tensors: list[torch.Tensor], owner: int, rate: float) -> Prepared:
        """Made once: finding the states alone costs the host more than the rest of a step."""
        if self._known is not self.state:  # it is another one after `load_state_dict`
            self._known = self.state
            self._prepared.clear()
        name = (self._live, owner, rate, self.backend, *map(id, tensors))
        try:
            return self._prepared[name]
        except KeyError:
            if len(self._prepared) >= PREPARED * len(self._parts):
                self._prepared.clear()
            keys = sorted(key for key in self._live if (self.owners[key], self.rates[key]) == (owner, rate))
            counters = {key: index for index, key in enumerate(keys)}
            slices = [
                WeightSlice(number, start, end, counters[key], self.config.weight_decay if decay else 0.0)
                for number, tensor in enumerate(tensors)
                for start, end, key, decay in self.tables[tensor]
                if key in counters
            ]
            update = prepare(slices, self.config.betas, self.config.eps, self.backend)
            self._prepared[name] = Prepared(update, keys, [self.state[tensor] for tensor in tensors])
            return self._prepared[name]

    def cut(self, tensor: torch.Tensor, gradients: list[torch.Tensor]) -> list[tuple[torch.Tensor, int]]:
        """The gradient of a tensor, given in consecutive pieces, as pieces of one owner each; padding is left out."""
        table, offset, index = self.tables[tensor], 0, 0
        pieces: list[tuple[torch.Tensor, int]] = []
        for gradient in gradients:
            flat = gradient.reshape(-1)
            end = offset + flat.numel()
            while index < len(table) and table[index].start < end:
                low, high = max(table[index].start, offset), min(table[index].end, end)
                pieces.append((flat[low - offset : high - offset], self.owners[table[index].key]))
                if table[index].end > end:
                    break
                index += 1
            offset = end
        return pieces

    def changed(self, tensor: torch.Tensor) -> list[tuple[int, int]]:
        """Elements `start:end` of a tensor that the last step has updated, in pieces."""
        return [(start, end) for start, end, key, _ in self.tables.get(tensor, ()) if key in self._live]

    def _measure(self, squares: torch.Tensor, tensors: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
        indices = {key: index for index, key in enumerate(self.steps)}
        for tensor, grad in zip(tensors, grads, strict=True):
            table = self.tables[tensor]
            borders = [border for start, end, _, _ in table for border in (start, end)]
            pieces = grad.reshape(-1).tensor_split(borders)[1::2]
            norms = torch.stack(torch._foreach_norm(pieces)).double()
            index = torch.tensor([indices[segment.key] for segment in table], device=norms.device)
            squares.index_add_(0, index, norms.square())
