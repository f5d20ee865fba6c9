"""What ZeRO-3 gathers in a micro-batch, by going through DeepSpeed's own schedule of fetches and releases.

Before a module runs, its partitioned weights are gathered and some of those that come next ("prefetch"); after it they
are released, unless the trace of the run needs them again before `reuse` more elements have gone by. A model smaller
than that distance is therefore gathered once in a micro-batch and stays whole from its forward to its backward pass; a
large one is gathered twice, and what activation checkpointing recomputes a third time. This is
`PartitionedParameterCoordinator` of DeepSpeed 0.19 with a complete trace, on one stream.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from sgtm.config.schema import Config, ModelConfig
from sgtm.estimate.shapes import parameter_sizes

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
    return coordinator.gathers


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
        self.gathers = Gathers()

    def run(self) -> None:
        for what, module in self.events:
            (self._fetch if what == "fetch" else self._release)(module)

    def _gather(self, names: list[str]) -> None:
        self.whole.update(names)
        self.live += sum(self.sizes[name] for name in names)
        self.gathers.names += names
        self.gathers.peak = max(self.gathers.peak, self.live)

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
