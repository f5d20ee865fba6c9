"""Collectives of a global step, as the engine configures DeepSpeed, and the bytes that they move.

Gradients are reduced in `distributed.communication` whatever the precision of the weights. ZeRO 0 and 1 reduce them
once in a step, ZeRO 2 and 3 for every micro-batch. The bf16 optimizer of ZeRO 0 and 1 and ZeRO 3 reduce-scatter;
DeepSpeed's ZeRO 1 and 2 reduce each share to its owner, which moves the same bytes, or all-reduce where shares are
small. Scalars (norms, flags) are left out. What hpZ saves is not counted: from its second gather in a step on, a weight
moves inside the groups of `zero_hpz_partition_size` alone; here, it always moves over all ranks.

tests/dist/test_estimate.py counts the same bytes in runs on 2 and 4 ranks.

What ZeRO-3 gathers in a micro-batch, by going through DeepSpeed's own schedule of fetches and releases.

Before a module runs, its partitioned weights are gathered and some of those that come next ("prefetch"); after it they
are released, unless the trace of the run needs them again before `reuse` more elements have gone by. A model smaller
than that distance is therefore gathered once in a micro-batch and stays whole from its forward to its backward pass; a
large one is gathered twice, and what activation checkpointing recomputes a third time. This is
`PartitionedParameterCoordinator` of DeepSpeed 0.19 with a complete trace, on one stream.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from math import ceil

from sgtm.config.schema import Config, ModelConfig
from sgtm.estimate.shapes import parameter_sizes

ALL_REDUCE, REDUCE, REDUCE_SCATTER, ALL_GATHER = "all-reduce", "reduce", "reduce-scatter", "all-gather"

PASSES = {ALL_REDUCE: 2, REDUCE: 1, REDUCE_SCATTER: 1, ALL_GATHER: 1}
"""How often a ring sends the tensor on."""
WIDTHS = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Collective:
    """One kind of collective of a step: `times` times `elements` of `width` bytes; `elements` of the whole tensor.

    overlapped  whether the ranks compute meanwhile
    """

    kind: str
    what: str
    elements: int
    width: int
    times: int = 1
    overlapped: bool = False

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends in a step: elements x width x times x passes x (ranks - 1) / ranks."""
        return self.times * ring_bytes(self.kind, self.elements * self.width, ranks)

    @property
    def passes(self) -> int:
        return PASSES[self.kind]


def ring_bytes(kind: str, size: int, ranks: int) -> float:
    """Bytes each rank sends in a ring collective over `size` bytes, the whole tensor on one rank (Patarasuk and Yuan,
    2009): an all-reduce is a reduce-scatter and an all-gather. In a reduce every rank but one sends the tensor on: the
    mean."""
    return PASSES[kind] * size * (ranks - 1) / ranks


def width_of(config: Config) -> int:
    """Bytes of a weight."""
    return WIDTHS[config.train.precision]


def sent_width(config: Config) -> int:
    """Bytes of an element of a gradient on its way."""
    return WIDTHS[config.distributed.communication]


def is_bf16_optimizer(config: Config, stage: int) -> bool:
    """Whether DeepSpeed's bf16 optimizer runs: in bf16 for ZeRO 0 and 1, unless the optimizer is the host's."""
    return config.train.precision == "bf16" and stage < 2 and not config.distributed.offload_optimizer


def padded(size: int, ranks: int) -> int:
    """Elements of a flat tensor that DeepSpeed cuts into equal parts, each on a border of 4 bytes in bf16."""
    return ceil(size / (2 * ranks)) * 2 * ranks


def split(sizes, ranks: int) -> int:
    """Elements of parameters that are each cut into equal parts for the ranks (ZeRO-3)."""
    return sum(ceil(size / ranks) * ranks for size in sizes)


def collectives(config: Config, stage: int, ranks: int, limits: Limits | None = None) -> list[Collective]:
    """Of one global step. Raises ValueError where the step does not divide by the ranks."""
    limits, sizes, width = limits or Limits(), parameter_sizes(config), width_of(config)
    accumulation = config.accumulation(ranks)
    if ranks == 1:
        return []
    total, sent = sum(sizes.values()), sent_width(config)
    if stage == 0 and width == 4:
        return [Collective(ALL_REDUCE, "gradients", total, sent)]
    if is_bf16_optimizer(config, stage):
        whole = padded(total, ranks)
        return [Collective(REDUCE_SCATTER, "gradients", whole, sent), Collective(ALL_GATHER, "weights", whole, width)]
    if stage < 3:
        times = accumulation if stage == 2 else 1
        kind = REDUCE if config.distributed.reduces_to_owners(total, ranks) else ALL_REDUCE
        reduced = Collective(kind, "gradients", total, sent, times, overlapped=stage == 2)
        return [reduced, Collective(ALL_GATHER, "weights", padded(total, ranks), width)]
    kept = persistent(sizes, limits)
    gathered = split((sizes[name] for name in gathers(config, limits).names), ranks)
    whole = split((sizes[name] for name in kept), ranks)
    return [
        Collective(REDUCE_SCATTER, "gradients", split(sizes.values(), ranks), sent, accumulation, overlapped=True),
        Collective(ALL_GATHER, "weights", gathered, width, accumulation, overlapped=True),
        Collective(ALL_GATHER, "persistent weights", whole, width, overlapped=True),
    ]


ROOT = ""


@dataclass(frozen=True)
class Limits:
    """DeepSpeed's settings, in elements, by their defaults; the engine sets `bucket` itself.

    persistence  parameters of at most this size stay whole on every rank (stage3_param_persistence_threshold)
    reuse        stage3_max_reuse_distance
    prefetch     stage3_prefetch_bucket_size
    live         stage3_max_live_parameters
    bucket       reduce_bucket_size
    sub_group    sub_group_size: elements of a rank's share that the optimizer updates at a time
    """

    persistence: int = 100_000
    reuse: int = 1_000_000_000
    prefetch: int = 50_000_000
    live: int = 1_000_000_000
    bucket: int = 200_000_000
    sub_group: int = 1_000_000_000


@dataclass
class Gathers:
    """names: parameters gathered in a micro-batch, each as often as it is; peak: most elements gathered at a time."""

    names: list[str] = field(default_factory=list)
    peak: int = 0


def persistent(sizes: dict[str, int], limits: Limits) -> set[str]:
    """Parameters that stay whole on every rank and are gathered only after the optimizer's step."""
    return {name for name, size in sizes.items() if size <= limits.persistence}


def gathered_times(config: Config, limits: Limits | None = None) -> dict[int, int]:
    """By number of gathers in a micro-batch, how many elements have it: of all parameters that are not persistent."""
    sizes, elements = parameter_sizes(config), Counter[int]()
    for name, times in Counter(gathers(config, limits or Limits()).names).items():
        elements[times] += sizes[name]
    return dict(sorted(elements.items()))


def gathers(config: Config, limits: Limits) -> Gathers:
    """Of one micro-batch, forward and backward, after the first."""
    coordinator = _Coordinator(parameter_sizes(config), _events(config.model), limits)
    coordinator.run()
    return coordinator.found


def _events(model: ModelConfig) -> list[tuple[str, str]]:
    """(`fetch` or `release`, module) in the order of a micro-batch; the root owns embeddings and head."""
    parts = ("attention_norm", "attention", "mlp_norm", "mlp")
    blocks = [[f"blocks.{i}.{part}" for part in parts] for i in range(model.layers)]

    def use(modules: list[str]) -> list[tuple[str, str]]:
        return [(what, module) for module in modules for what in ("fetch", "release")]

    events = [("fetch", ROOT)]
    for block in blocks:
        events += use(block)
    events += [*use(["final_norm"]), ("release", ROOT), ("fetch", ROOT), *use(["final_norm"])]
    for *others, mlp in reversed(blocks):
        events.append(("fetch", mlp))
        if model.activation_checkpointing:
            events += [*use(others), ("fetch", mlp)]  # the MLP's second forward pass ends where its backward takes over
        events += [("release", mlp), *use(others[::-1])]
    return [*events, ("release", ROOT)]


class _Coordinator:
    """State of the fetches: which parameters are whole here, and what the prefetcher has looked at."""

    def __init__(self, sizes: dict[str, int], events: list[tuple[str, str]], limits: Limits):
        self.sizes, self.limits, self.events = sizes, limits, events
        self.persistent = persistent(sizes, limits)
        self.members: dict[str, list[str]] = {}
        for name in sizes:
            owner = name.rpartition(".")[0]
            self.members.setdefault(owner, []).append(name)
        self.order = [module for what, module in events if what == "fetch"]
        self.queue = deque((name, step) for step, module in enumerate(self.order) for name in self.members[module])
        self.last_seen = dict.fromkeys(sizes, -1)  # step of the latest use that has left the queue
        self.whole = set(self.persistent)
        self.live, self.step = 0, 0
        self.found = Gathers()

    def run(self) -> None:
        for what, module in self.events:
            (self._fetch if what == "fetch" else self._release)(module)

    def _gather(self, names: list[str]) -> None:
        self.whole.update(names)
        self.live += sum(self.sizes[name] for name in names)
        self.found.names += names
        self.found.peak = max(self.found.peak, self.live)

    def _fetch(self, module: str) -> None:
        wanted = self.members[module]
        self._gather([name for name in wanted if name not in self.whole])
        unseen = {name for name in wanted if self.last_seen[name] < self.step}
        while unseen:
            name, self.last_seen[name] = self._pop()
            unseen.discard(name)
        room = min(self.limits.live - self.live, self.limits.prefetch)
        ahead: list[str] = []
        while self.queue and sum(self.sizes[name] for name in ahead) < room:
            name, step = self._pop()
            self.last_seen[name] = max(self.last_seen[name], step)
            if name not in self.whole and name not in ahead:
                ahead.append(name)
        self._gather(ahead)
        self.step += 1

    def _pop(self) -> tuple[str, int]:
        return self.queue.popleft()

    def _release(self, module: str) -> None:
        names = {n for n in self.members[module] if n not in self.persistent and self.last_seen[n] <= self.step}
        passed = 0
        for coming in self.order[self.step :]:
            if passed >= self.limits.reuse or not names:
                break
            names.difference_update(self.members[coming])
            passed += sum(self.sizes[name] for name in self.members[coming])
        for name in names & self.whole:
            self.whole.remove(name)
            self.live -= self.sizes[name]
