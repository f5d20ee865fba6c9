"""AdamW with exact freeze for the parameters of a masked Hugging Face model.

A group or joint kind that no token of the global step may update keeps its weights, both moments and its own step count
bit for bit; nothing decays it. Which ones those are follows from the labels of the step's forward passes, on all
ranks.

The segments of `sgtm.distributed.optim` are ranges of a flattened tensor. A group's columns of an [out, in] weight
would be `out` such ranges, a quarter of a million in a model of 32 layers of width 4096: here a piece of a parameter is
a strided view, which the update of torch takes as it is. DeepSpeed flattens parameters and cuts them at any element:
the pieces are then views of the flat tensors, at most three where a range of columns was one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from sgtm.integrations.binding import LABELS, Binding, binding_of
from sgtm.integrations.families import Owned, pieces
from sgtm.model.rows import live_keys

if TYPE_CHECKING:
    from sgtm.distributed.segments import Fragment


class Stretch(NamedTuple):
    """Elements of a contiguous tensor: `columns` each of `rows` rows that are `stride` apart, from `offset` on."""

    key: str
    offset: int
    rows: int
    columns: int
    stride: int

    @property
    def contiguous(self) -> bool:
        return self.rows == 1 or self.columns == self.stride

    def of(self, tensor: Tensor) -> Tensor:
        """Its view of a tensor."""
        return tensor.view(-1).as_strided(
            (self.rows, self.columns), (self.stride, 1), tensor.storage_offset() + self.offset
        )


class SgtmAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) that leaves alone what the labels of a step may not update.

    model   masked by `apply_sgtm`, before DeepSpeed or another wrapper takes it
    params  parameters or groups of them, as for any optimizer; all of the model's that need gradients, if None

    State of a parameter: `exp_avg`, `exp_avg_sq`, of its shape. The number of updates of each key is in every group of
    `param_groups`, as `steps`, and with it in a state dict.

    Raises ValueError for a model without masks, for parameters that are not the model's, and in `step` where no forward
    pass had labels since the last one.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        self.binding: Binding = binding_of(model)
        names = {parameter: name for name, parameter in model.named_parameters()}
        chosen = [p for p in model.parameters() if p.requires_grad] if params is None else params
        super().__init__(chosen, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        steps = {key: 0 for owned in self.binding.owned.values() for key in sorted(owned.keys)}
        for group in self.param_groups:
            group["steps"] = steps
        members = [parameter for group in self.param_groups for parameter in group["params"]]
        if any(parameter not in names for parameter in members):
            raise ValueError("params hold a parameter that is not the masked model's; give those of the same model")
        self.parameters = {names[parameter]: parameter for parameter in members}
        self._pieces = {
            parameter: list(_whole(self.binding.owned[name])) for name, parameter in self.parameters.items()
        }
        self._sharded = False
        self._live: frozenset[str] = frozenset()

    def bind(self, wrapper: Any) -> None:
        """Find the parameters in the tensors of DeepSpeed: `wrapper` is `engine.optimizer`, before the first step."""
        from sgtm.distributed.segments import fragments  # sets variables of the environment for DeepSpeed

        self._pieces, self._sharded = {}, True
        for fragment in fragments(wrapper, self.parameters):
            self._pieces.setdefault(fragment.tensor, []).extend(_cut(self.binding.owned[fragment.name], fragment))

    @property
    def bound(self) -> bool:
        """Whether `bind` has been called."""
        return self._sharded

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the pieces that are live. DeepSpeed calls it once for each of its groups in one global step."""
        members = [parameter for group in self.param_groups for parameter in group["params"]]
        if any(parameter not in self._pieces for parameter in members):
            if self._sharded or self.binding.trained:
                raise RuntimeError("DeepSpeed holds the parameters: call bind(engine.optimizer) before the first step")
            for parameter in members:  # DeepSpeed allocates the moments before it has linked its tensors
                self._moments(parameter)
            return
        if not self.binding.stepped:
            self._begin()
        elif not self._sharded:
            raise ValueError(f"no forward pass with {LABELS} since the last step: nothing says what may be updated")
        for group in self.param_groups:
            self._update(group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Also forgets which labels have been trained."""
        super().zero_grad(set_to_none)
        self.binding.new_step()

    def _begin(self) -> None:
        """What this global step updates, on all ranks; raises ValueError where none had labels."""
        labels = _on_all_ranks(self.binding.trained, len(self.binding.space.labels), next(iter(self._pieces)).device)
        if not labels:
            raise ValueError(f"no forward pass with {LABELS} since the last step: nothing says what may be updated")
        self.binding.stepped = True
        steps = self.param_groups[0]["steps"]
        self._live = live_keys(self.binding.tables, labels).intersection(steps)
        for key in self._live:
            steps[key] += 1
        for group in self.param_groups:
            group["steps"] = steps  # one dict again after `load_state_dict`

    def _update(self, group: dict[str, Any]) -> None:
        """torch's AdamW on views: fused where they are contiguous, which its fused kernel takes for granted."""
        views: dict[bool, list[tuple[Tensor, ...]]] = {True: [], False: []}
        counts: dict[bool, list[float]] = {True: [], False: []}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            tensors = (parameter, parameter.grad.contiguous(), *self._moments(parameter))
            for piece in _merged(self._pieces[parameter], self._live, group["steps"]):
                views[piece.contiguous].append(tuple(piece.of(tensor) for tensor in tensors))
                counts[piece.contiguous].append(float(group["steps"][piece.key] - 1))
        beta1, beta2 = group["betas"]
        options = {"amsgrad": False, "beta1": beta1, "beta2": beta2, "maximize": False}
        options |= {name: group[name] for name in ("lr", "weight_decay", "eps")}
        for fused, parts in views.items():
            if parts:
                done = torch.tensor(counts[fused], device=parts[0][0].device if fused else "cpu").unbind()
                members, grads, firsts, seconds = map(list, zip(*parts, strict=True))
                adamw(members, grads, firsts, seconds, [], list(done), fused=fused, **options)

    def _moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        return state["exp_avg"], state["exp_avg_sq"]


def _whole(owned: Owned) -> Iterator[Stretch]:
    """The pieces of a parameter that is one contiguous tensor."""
    for key, start, end in pieces(owned):
        if owned.dim == 0:
            yield Stretch(key, start * owned.columns, end - start, owned.columns, owned.columns)
        else:
            yield Stretch(key, start, owned.rows, end - start, owned.columns)


def _cut(owned: Owned, fragment: Fragment) -> Iterator[Stretch]:
    """The pieces of a fragment, which begins and ends at any element of the parameter."""
    first, last, width = fragment.start, fragment.end, owned.columns
    shift = fragment.offset - first
    if owned.dim == 0:
        for key, start, end in pieces(owned):
            low, high = max(start * width, first), min(end * width, last)
            if low < high:
                yield Stretch(key, low + shift, 1, high - low, high - low)
        return
    row, final = first // width, (last - 1) // width
    middle = (row + (first % width != 0), final + (last % width == 0))  # whole rows
    for key, start, end in pieces(owned):
        for line in {row, final} - set(range(*middle)):
            low, high = max(line * width + start, first), min(line * width + end, last)
            if low < high:
                yield Stretch(key, low + shift, 1, high - low, high - low)
        if middle[0] < middle[1]:
            yield Stretch(key, middle[0] * width + start + shift, middle[1] - middle[0], end - start, width)


def _merged(parts: list[Stretch], live: frozenset[str], steps: Mapping[str, int]) -> Iterator[Stretch]:
    """Live pieces, neighbours with as many updates in one: a launch less for each."""
    waiting: Stretch | None = None
    for piece in parts:
        if piece.key not in live or piece.columns == 0 or piece.rows == 0:
            continue
        if waiting is not None and steps[waiting.key] == steps[piece.key]:
            joined = _joined(waiting, piece)
            if joined is not None:
                waiting = joined
                continue
        if waiting is not None:
            yield waiting
        waiting = piece
    if waiting is not None:
        yield waiting


def _joined(first: Stretch, second: Stretch) -> Stretch | None:
    """Two pieces as one, where the second is what follows the first, or beside it in the same rows."""
    if first.contiguous and second.contiguous:
        size = first.rows * first.columns
        if first.offset + size != second.offset:
            return None
        size += second.rows * second.columns
        return Stretch(first.key, first.offset, 1, size, size)
    if first.rows == second.rows and first.stride == second.stride and first.offset + first.columns == second.offset:
        return first._replace(columns=first.columns + second.columns)
    return None


def _on_all_ranks(labels: Iterable[int], number: int, device: torch.device) -> list[int]:
    """The labels of all ranks. On a device the host waits for the answer, once in a global step."""
    trained = torch.zeros(number, dtype=torch.int32)
    trained[list(labels)] = 1
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        trained = trained.to(device)
        dist.all_reduce(trained, dist.ReduceOp.MAX)
    return trained.cpu().nonzero().flatten().tolist()
