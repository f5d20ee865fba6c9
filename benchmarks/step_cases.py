"""The training steps as they are timed: batches of every mixing mode, our step, and that of the plain model.

Both train alike, as under DeepSpeed on one GPU: parameters in bf16, gradients gathered in fp32, AdamW on fp32 master
weights and moments, without clipping. Ours leaves what no token of the step may update bitwise alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from model_shapes import LABELS, Setting
from plain import Plain

from sgtm.data.batch import Batch
from sgtm.distributed.segments import Fragment, segment_tables
from sgtm.masking.labels import FIRST_FORGET, UNLABELED
from sgtm.masking.strategy import build_tables
from sgtm.model.rows import live_keys
from sgtm.model.transformer import Transformer
from sgtm.train.optim import SegmentedAdamW
from sgtm_kernels.plan import Tables

MICRO_BLOCKS = 4  # default of data.micro_blocks
DOCUMENTS = (5, 20, 25, 25, 25)  # percent of a sequence
NONE, NOTHING, PURE = "none", "nothing masked", "pure forget"


@dataclass(frozen=True)
class AdamW:
    """Section `optimizer`, as far as `SegmentedAdamW` reads it."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    masked_update: str = "exact"


@dataclass(frozen=True)
class Pieces:
    """Labels, lengths and documents of a micro-batch, as in `sgtm.data.batch.Batch`."""

    labels: tuple[int, ...]
    lengths: tuple[int, ...]
    documents: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Case:
    """One step of ours.

    percent  of forget tokens
    mixing   the modes of which this is a step
    of       name of the unmasked step on the same batches
    """

    strategy: str
    percent: int
    mixing: tuple[str, ...]
    batches: tuple[Pieces, ...]
    of: str = NONE


@dataclass(frozen=True)
class Mean:
    """Steps of which a mixing mode takes so many each in the long run: `weights` by name of the case, sum 1."""

    percent: int
    mixing: tuple[str, ...]
    weights: dict[str, float]
    of: str


def cases(setting: Setting) -> dict[str, Case | Mean]:
    """Every share of forget tokens in every mixing mode, each step once.

    With 0 and 100 % the modes do not differ. A share that is finer than a step of the mode can have (one label for a
    step, a quarter of it for `micro`, a sequence of few) comes about over steps: a mean of two others.
    """
    every = ("step", "micro", "sequence", "token")
    plain = by_sequence(setting, 0)
    found: dict[str, Case | Mean] = {
        NONE: Case("none", 0, every, plain),
        NOTHING: Case("sgtm", 0, every, plain),
        PURE: Case("sgtm", 100, every, by_sequence(setting, 100)),
        "25 %, sequence": Case("sgtm", 25, ("sequence",), by_sequence(setting, 25)),
    }
    if setting.sequences * 5 % 100:
        found["5 %, sequence"] = Mean(5, ("sequence",), {NOTHING: 0.8, "25 %, sequence": 0.2}, NONE)
    else:
        found["5 %, sequence"] = Case("sgtm", 5, ("sequence",), by_sequence(setting, 5))
    for percent in (5, 25):
        weights = {NOTHING: 1 - percent / 100, PURE: percent / 100}
        found[f"{percent} %, step"] = Mean(percent, ("step",), weights, NONE)
    for mode, batches, percents in (("micro", by_micro_batch, (0, 25)), ("token", by_document, (5, 25))):
        base = f"{NONE}, {mode}"
        found[base] = Case("none", 0, (mode,), batches(setting, 0), base)
        for percent in percents:
            name = f"{percent} %, {mode}" if percent else f"{NOTHING}, {mode}"
            found[name] = Case("sgtm", percent, (mode,), batches(setting, percent), base)
    weights = {f"{NOTHING}, micro": 0.8, "25 %, micro": 0.2}
    return found | {"5 %, micro": Mean(5, ("micro",), weights, f"{NONE}, micro")}


def by_sequence(setting: Setting, percent: int) -> tuple[Pieces, ...]:
    """Whole sequences of a label, sorted by label and dealt out to the micro-batches, as by the loader."""
    n, hands = setting.sequences * percent // 100, setting.accumulation
    labels = [FIRST_FORGET] * n + [UNLABELED] * (setting.sequences - n)
    lengths = (setting.model.context,) * setting.micro_batch
    return tuple(Pieces(tuple(labels[hand::hands]), lengths) for hand in range(hands))


def by_micro_batch(setting: Setting, percent: int) -> tuple[Pieces, ...]:
    """`MICRO_BLOCKS` micro-batches, each of one label."""
    n, lengths = MICRO_BLOCKS * percent // 100, (setting.model.context,) * setting.micro_batch
    labels = [FIRST_FORGET] * n + [UNLABELED] * (MICRO_BLOCKS - n)
    return tuple(Pieces((label,) * setting.micro_batch, lengths) for label in labels)


def by_document(setting: Setting, percent: int) -> tuple[Pieces, ...]:
    """Sequences of five documents that do not attend to one another, in another order in each; the same cuts whatever
    the labels are."""
    shares = list(accumulate(DOCUMENTS, initial=0))
    context, forget = setting.model.context, shares.index(percent)
    sizes = [end - start for start, end in pairwise(share * context // 100 for share in shares)]
    batches = []
    for _ in range(setting.accumulation):
        order = [(row + i) % len(sizes) for row in range(setting.micro_batch) for i in range(len(sizes))]
        lengths = tuple(sizes[i] for i in order)
        labels = tuple(FIRST_FORGET if i < forget else UNLABELED for i in order)
        batches.append(Pieces(labels, lengths, tuple(pairwise(accumulate(lengths, initial=0)))))
    return tuple(batches)


def random_batches(setting: Setting, batches: tuple[Pieces, ...], device: torch.device) -> list[Batch]:
    """Random tokens, every one of them with a target; the same ones for batches of the same sizes."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(sum(pieces.lengths) for pieces in batches)
    labels = frozenset(label for pieces in batches for label in pieces.labels)
    found = []
    for pieces in batches:
        size = (sum(pieces.lengths) // setting.model.context, setting.model.context)
        ids, targets = (torch.randint(setting.model.vocab_size, size, generator=generator).to(device) for _ in range(2))
        found.append(Batch(ids, targets, pieces.labels, pieces.lengths, pieces.documents, tokens, labels))
    return found


class Mixed:
    """Parameters of a model in `dtype`, and by name their fp32 master weights, in whose `.grad` gradients add up."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype):
        self.masters = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.model = model.to(dtype)
        self.parameters = dict(model.named_parameters())
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(_gather, self.masters[name]))

    def forget_gradients(self) -> None:
        for master in self.masters.values():
            master.grad = None

    def bytes(self, moments: list[torch.Tensor]) -> int:
        """What stays in memory between steps."""
        held = [*self.parameters.values(), *self.masters.values(), *moments]
        return sum(t.numel() * t.element_size() for t in held)


def _gather(master: torch.Tensor, parameter: torch.Tensor) -> None:
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        master.grad.add_(parameter.grad)
    parameter.grad = None


class Ours:
    """Steps of our model. One set of weights for all backends and strategies."""

    def __init__(self, setting: Setting, device: torch.device, dtype: torch.dtype):
        with device:
            self.mixed = Mixed(Transformer(setting.model, setting.partition), dtype)
        rows, masters = self.mixed.model.parameter_rows(), self.mixed.masters
        self.config, self.loss = AdamW(), None
        self.optimizer = SegmentedAdamW(masters.values(), self.config, "runs")
        numels = {name: master.numel() for name, master in masters.items()}
        fragments = [Fragment(master, 0, name, 0, master.numel()) for name, master in masters.items()]
        keys = {key for layout in rows.values() for key in layout.keys}
        self.optimizer.set_segments(segment_tables(fragments, numels, rows), keys)

    def step(self, backend: str, tables: Tables, batches: list[Batch]) -> None:
        self._use(backend)
        for batch in batches:
            plan = batch.plan(tables)
            self.loss, _ = self.mixed.model(batch.input_ids, batch.targets, plan, 1 / batch.step_targets)
            self.loss.backward()
        live = live_keys(tables, batches[0].step_labels)
        self.optimizer.begin_step(live, self.config.lr)
        self.optimizer.step()
        torch._foreach_copy_(*zip(*self._slices(live), strict=True))
        self.mixed.forget_gradients()

    def _use(self, backend: str) -> None:
        for owner in (self.optimizer, *self.mixed.model.modules()):
            if hasattr(owner, "backend"):
                owner.backend = backend

    def _slices(self, live: frozenset[str]):
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
        self.loss = None

    def step(self, batches: list[Batch]) -> None:
        for batch in batches:
            self.loss = self.model(batch.input_ids, batch.targets, 1 / batch.step_targets)
            self.loss.backward()
        self.optimizer.step()
        torch._foreach_copy_([p.detach() for p in self.mixed.parameters.values()], list(self.mixed.masters.values()))
        self.mixed.forget_gradients()

    def bytes(self) -> int:
        return self.mixed.bytes([t for state in self.optimizer.state.values() for t in state.values()])


def tables_of(setting: Setting, strategy: str) -> Tables:
    return build_tables(LABELS, strategy, setting.joint if strategy == "sgtm" else "free")
