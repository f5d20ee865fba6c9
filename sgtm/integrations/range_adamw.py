"""AdamW that freezes ranges of rows or columns of a parameter: `RangeAdamW`, and what `SgtmAdamW` shares with it.

Of what is frozen, a step changes no bit, weights and both moments: no gradient, no decay, no momentum. A mask on the
gradient alone does not do that, and cannot be put on where ZeRO or FSDP hold the gradients (docs/masked-gradients.md).
Where the parameters are is what differs between trainers:

    plain PyTorch, DDP, ZeRO 0   the parameters themselves
    ZeRO 1 to 3                  flat tensors of DeepSpeed, which `bind` finds
    FSDP2 (`fully_shard`)        local shards of DTensors, which hold rows of the parameter
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from sgtm.integrations.stretches import Owned, Stretch, merged, stretches
from sgtm.process.names import did_you_mean

LIVE, FROZEN = "live", "frozen"


class StretchAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) on the stretches of parameters that are live in a step.

    model   before DeepSpeed takes it, after `fully_shard`
    owned   who owns each parameter, by name
    params  parameters or groups of them, as for any optimizer; all of the model's that need gradients, if None

    State of a parameter: `exp_avg`, `exp_avg_sq`, of its shape, dtype and sharding.
    """

    def __init__(
        self,
        model: nn.Module,
        owned: Mapping[str, Owned],
        params: Iterable[Any] | None,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ):
        chosen = [p for p in model.parameters() if p.requires_grad] if params is None else params
        super().__init__(chosen, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._model, self._owned = model, owned
        self._stretches: dict[Tensor, list[Stretch]] = {}
        self._bound = self._stepped = False
        names: dict[Tensor, str] = {parameter: name for name, parameter in _named(model)}
        if any(parameter not in names for parameter in self._members()):
            raise ValueError("params hold a parameter that is not the model's; give those of the same model")
        self._names = {names[parameter] for parameter in self._members()}
        if unknown := sorted(self._names - set(owned)):
            raise ValueError(f"{unknown[0]} is no parameter of the model without its wrapper; give that model")
        self._find()  # what cannot be found is an error here
        self._stretches = {}  # keeps no parameters alive that FSDP2 is about to replace

    def bind(self, wrapper: Any) -> None:
        """Find the parameters in the tensors of DeepSpeed: `wrapper` is `engine.optimizer`, before the first step."""
        from sgtm.distributed.segments import fragments  # sets variables of the environment for DeepSpeed

        parameters = {name: p for name, p in _named(self._model) if name in self._names}
        self._stretches, self._bound = {}, True
        for tensor, offset, name, start, end in fragments(wrapper, parameters):
            self._stretches.setdefault(tensor, []).extend(stretches(self._owned[name], start, end, offset))

    @property
    def bound(self) -> bool:
        """Whether `bind` has been called."""
        return self._bound

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the stretches that are live; returns the loss of `closure`, which is called first, with gradients.

        DeepSpeed calls it once for each of its groups in one global step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_step()
        return loss

    def _take_step(self) -> None:
        if self._rehearses() or not self._linked():
            for parameter in self._members():
                self._moments(parameter)
            return
        live = self._live_keys()
        for group in self.param_groups:
            self._update(group, live)

    def _live_keys(self) -> frozenset[str]:
        """What this step updates."""
        raise NotImplementedError

    def _count_update(self, group: dict[str, Any], parameter: Tensor) -> Mapping[str, int]:
        """Count this update of a parameter, if that has not been done; returns the updates of each of its live keys."""
        raise NotImplementedError

    def _rehearses(self) -> bool:
        """Whether this step is one of torch.distributed.checkpoint, which takes one to allocate the moments."""
        return False

    def _unbound(self) -> bool:
        """Whether a step on tensors that are not the model's is a real one. DeepSpeed allocates moments with zeros."""
        return any(p in self.state or (p.grad is not None and bool(p.grad.any())) for p in self._members())

    def _members(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _find(self) -> None:
        """Stretches of the model's parameters, or of this rank's shards of them."""
        if any(map(is_sharded, self._members())) and not any(map(_is_fsdp, self._model.modules())):
            raise ValueError("the parameters are DTensors, but not of fully_shard: tensor parallelism is not supported")
        self._stretches = {
            parameter: list(stretches(self._owned[name], *_held(name, parameter)))
            for name, parameter in _named(self._model)
            if name in self._names
        }

    def _linked(self) -> bool:
        """Whether it is known where the parameters are. Raises RuntimeError where that should be and is not."""
        if not self._bound and not self._stepped:
            self._find()  # again: Accelerate shards the model after the optimizer is built, and replaces `params`
        self._stepped = True
        if all(parameter in self._stretches for parameter in self._members()):
            return True
        if not self._bound and any(map(is_sharded, self._stretches)):
            raise RuntimeError(
                "params are not the model's any more: build the optimizer after fully_shard, which replaces them"
            )
        if self._bound or self._unbound():
            raise RuntimeError("DeepSpeed holds the parameters: call bind(engine.optimizer) before the first step")
        return False  # DeepSpeed allocates the moments before it has linked its tensors

    def _update(self, group: dict[str, Any], live: frozenset[str]) -> None:
        """torch's AdamW on views: fused where they are contiguous, which its fused kernel takes for granted."""
        views: dict[bool, list[tuple[Tensor, ...]]] = {True: [], False: []}
        counts: dict[bool, list[float]] = {True: [], False: []}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            steps = self._count_update(group, parameter)
            tensors = [_local(tensor) for tensor in (parameter, parameter.grad, *self._moments(parameter))]
            tensors[1] = tensors[1].contiguous()
            for stretch in merged(self._stretches[parameter], live, steps):
                views[stretch.contiguous].append(tuple(stretch.of(tensor) for tensor in tensors))
                counts[stretch.contiguous].append(float(steps[stretch.key] - 1))
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


class RangeAdamW(StretchAdamW):
    """AdamW that leaves rows or columns of some parameters bitwise as they are, and trains everything else.

        RangeAdamW(model, {"model.embed_tokens.weight": slice(0, 32000)}, lr=1e-4)

    model   before DeepSpeed takes it (then `bind(engine.optimizer)`), after `fully_shard` of FSDP2
    frozen  by name in `named_parameters()`, what is frozen, as an index of the whole parameter: rows `slice(0, 8)`,
            columns `(slice(None), slice(0, 8))`, or a list of such
    params  parameters or groups of them, as for any optimizer; all of the model's that need gradients, if None

    State of a parameter: `exp_avg`, `exp_avg_sq`, of its shape, dtype and sharding, 0 where it is frozen, and `step`.

    Raises ValueError for names that are no parameter in training, for indexes that are empty, overlap or do not fit,
    for parameters that are not the model's, and for those of FullyShardedDataParallel (FSDP1).
    """

    def __init__(
        self,
        model: nn.Module,
        frozen: Mapping[str, Any],
        params: Iterable[Any] | None = None,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        owned = _owned(model, frozen)
        super().__init__(model, owned, params, lr, betas, eps, weight_decay)
        if left_out := sorted(
            name for name, owner in owned.items() if FROZEN in owner.keys and name not in self._names
        ):
            raise ValueError(f"frozen has {left_out[0]!r}, which this optimizer does not train at all: leave it out")

    def _live_keys(self) -> frozenset[str]:
        return frozenset((LIVE,))

    def _count_update(self, group: dict[str, Any], parameter: Tensor) -> Mapping[str, int]:
        state = self.state[parameter]
        state["step"] = state.get("step", torch.tensor(0.0)) + 1
        return {LIVE: int(state["step"])}


def _owned(model: nn.Module, frozen: Mapping[str, Any]) -> dict[str, Owned]:
    refuse_fsdp1(model)
    everything = dict(_named(model, remove_duplicate=False))
    indexes: dict[Tensor, tuple[str, Any]] = {}
    for name, index in frozen.items():
        parameter = everything.get(name)
        if parameter is None or not parameter.requires_grad:
            problem = (
                "does not need gradients" if parameter is not None else "is unknown" + did_you_mean(name, everything)
            )
            raise ValueError(f"frozen has {name!r}, which {problem}; give names of parameters that are trained")
        if parameter in indexes:
            raise ValueError(f"frozen has {name!r}, which is tied to another one there; give one of them")
        indexes[parameter] = (name, index)
    owned = {}
    for name, parameter in _named(model):
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty one
        _, index = indexes.get(parameter, (name, []))
        owned[name] = frozen_ranges(name, index, shape)
    return owned


def frozen_ranges(name: str, index: Any, shape: tuple[int, ...]) -> Owned:
    """Ranges of a parameter of this shape with the keys `live` and `frozen`; `index` as in `RangeAdamW`."""
    ranges = sorted(_range(name, one, shape) for one in (index if isinstance(index, list) else [index]))
    dims = {dim for dim, _, _ in ranges}
    if len(dims) > 1:
        raise ValueError(f"frozen[{name!r}] has rows and columns; freeze one or the other of a parameter")
    dim = dims.pop() if dims else 0
    rows = shape[0] if shape else 1
    columns = 1
    for size in shape[1:]:
        columns *= size
    bounds, keys = [0], []
    for _, low, high in ranges:
        if low < bounds[-1]:
            raise ValueError(f"frozen[{name!r}] has ranges that overlap at {low}; give each row or column once")
        if low > bounds[-1]:
            bounds.append(low)
            keys.append(LIVE)
        bounds.append(high)
        keys.append(FROZEN)
    end = columns if dim else rows
    if bounds[-1] < end:
        bounds.append(end)
        keys.append(LIVE)
    return Owned(dim, tuple(bounds), tuple(keys), rows, columns)


def _range(name: str, index: Any, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Dimension, start and end of one index."""
    parts = index if isinstance(index, tuple) else (index,)
    if not parts or len(parts) > min(2, len(shape)) or not all(isinstance(part, slice) for part in parts):
        raise ValueError(f"frozen[{name!r}] is {index!r}; give slice(start, end) of rows, or (slice(None), slice(...))")
    dim = len(parts) - 1
    if dim and (parts[0] != slice(None) or len(shape) != 2):
        raise ValueError(f"frozen[{name!r}] is {index!r} of shape {shape}; freeze all of some columns of a matrix")
    part, size = parts[dim], shape[dim]
    low, high, step = part.indices(size)
    outside = any(edge is not None and not -size <= edge <= size for edge in (part.start, part.stop))
    if outside or step != 1 or low >= high:
        what = "columns" if dim else "rows"
        raise ValueError(f"frozen[{name!r}] is {index!r}; give a range of its {size} {what}, not an empty one")
    return dim, low, high


def _named(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters and their names, also where layers are inside a `CheckpointWrapper` of torch."""
    for name, parameter in model.named_parameters(remove_duplicate=remove_duplicate):
        yield name.replace("_checkpoint_wrapped_module.", ""), parameter


def refuse_fsdp1(model: nn.Module) -> None:
    """Raise ValueError for a model that FSDP1 has wrapped, in whole or in part."""
    if any(cls.__name__ == "FullyShardedDataParallel" for module in model.modules() for cls in type(module).__mro__):
        raise ValueError(
            "FullyShardedDataParallel flattens the parameters, so that rows cannot be told apart; use fully_shard"
        )


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, by its attribute: importing the class takes a second where nobody else does."""
    return hasattr(tensor, "device_mesh")


def _is_fsdp(module: nn.Module) -> bool:
    """Whether `fully_shard` has it, by name, for the same reason."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _held(name: str, parameter: Any) -> tuple[int, int | None]:
    """First and last element of the flattened parameter that this rank holds; None: all of it."""
    if not is_sharded(parameter):
        return 0, None
    if not all(type(one).__name__ == "Replicate" or str(one) == "S(0)" for one in parameter.placements):
        raise ValueError(f"{name} is sharded as {parameter.placements}; only shards of rows, Shard(0), can be frozen")
    (chunk,) = parameter.__create_chunk_list__()  # of torch.distributed.checkpoint: where the shard begins
    first = chunk.offsets[0] * (parameter.numel() // max(1, parameter.shape[0]))
    return first, first + chunk.sizes.numel()
