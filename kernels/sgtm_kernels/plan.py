"""The masks of one micro-batch, as the ops need them.

`MaskPlan` joins a strategy's tables (tables.py) with the *label runs* of one micro-batch: maximal stretches of tokens
of one label. Labels are known on the CPU when the batch is built, so everything here is plain Python arithmetic on a
handful of integers; no op ever reads a label from a device tensor to decide what to do.

The promise: an op that gets its work from a plan multiplies each token's contribution to the gradient of each group's
rows by exactly `update[label][group]`, and where that is 0 the token is not part of the computation (or enters as an
exact zero), so its content cannot change a bit of the result. `tests/kernels` checks it for every op.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, pairwise
from typing import Any, NamedTuple, TypeVar
from weakref import finalize

import torch

from sgtm_kernels.signature import Signature, signature_of
from sgtm_kernels.tables import JOINT_KINDS, PROJECTIONS, Tables

# Up to this many token ranges, a weight gradient is a sum of matmuls over slices; beyond it, one matmul over a copy of
# dY (or X) whose rows are scaled by their weight. A slice costs a launch, a copy costs a pass over the activations.
MAX_SLICES = 8

T = TypeVar("T")


class LabelRun(NamedTuple):
    """Tokens `start:end` of the flattened micro-batch, all of one label."""

    label: int
    start: int
    end: int


class Slice(NamedTuple):
    """Tokens `start:end` with the weight their contribution is multiplied by (never 0)."""

    start: int
    end: int
    weight: float


class Updaters(NamedTuple):
    """The tokens that may update something: the weight of each label, and the token ranges where it is not 0."""

    by_label: tuple[float, ...]
    slices: tuple[Slice, ...]


class RowWork(NamedTuple):
    """Rows `start:end` of a weight, and the tokens that may update them."""

    start: int
    end: int
    tokens: Updaters


def check_known(what: str, name: str | None, names: Sequence[str | None]) -> None:
    """Raises ValueError for a name that is not one of these."""
    if name not in names:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(map(str, names))}")


def merge_label_runs(labels: list[int], lengths: list[int]) -> tuple[LabelRun, ...]:
    """Runs of consecutive pieces with these labels and token counts; neighbours of one label become one run."""
    runs: list[LabelRun] = []
    position = 0
    for label, length in zip(labels, lengths, strict=True):
        if runs and runs[-1].label == label:
            runs[-1] = runs[-1]._replace(end=position + length)
        elif length:
            runs.append(LabelRun(label, position, position + length))
        position += length
    return tuple(runs)


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """The masks of one micro-batch of `batch` sequences of `seq_len` tokens.

    label_runs cover `0:batch*seq_len` without gaps, in order
    documents  token ranges `(start, end)` that do not attend to one another, covering the micro-batch and never
               crossing a sequence; None: every sequence attends to all of its own past
    handle     int64 scalar on the CPU that stands for this plan where an op of torch's dispatcher takes one: its
               arguments are tensors and numbers, and a compiled graph serves every plan only if it sees no number
               of it. `plan_of` gives the plan back, for as long as the handle lives: a graph that saves the handle
               for its backward pass has the plan then, whoever else has dropped it
    signature  what a compiled graph depends on
    """

    tables: Tables
    label_runs: tuple[LabelRun, ...]
    batch: int
    seq_len: int
    documents: tuple[tuple[int, int], ...] | None = None
    signature: Signature = field(init=False, repr=False)
    handle: torch.Tensor = field(init=False, repr=False)
    _cache: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        edges = [0, *(run.end for run in self.label_runs)]
        if [run.start for run in self.label_runs] != edges[:-1] or edges[-1] != self.tokens:
            raise ValueError(
                f"label runs {self.label_runs} must cover the {self.tokens} tokens of the micro-batch in order"
            )
        if self.documents is not None:
            ends = [0, *(end for _, end in self.documents)]
            crossed = any(start // self.seq_len != (end - 1) // self.seq_len for start, end in self.documents)
            if [start for start, _ in self.documents] != ends[:-1] or ends[-1] != self.tokens or crossed:
                raise ValueError(
                    f"documents must cover the {self.tokens} tokens in order, none across sequences of {self.seq_len}; "
                    f"got {self.documents}"
                )
        if any(not 0 <= run.label < len(self.tables.labels) for run in self.label_runs):
            raise ValueError(f"label runs {self.label_runs} name a label outside {self.tables.labels}")
        # A plain attribute: a compiled graph has a guard on each boolean that it reads.
        signature = signature_of(self.tables, self.present, self.documents is not None)
        object.__setattr__(self, "signature", signature)
        number = next(_NUMBERS)
        _PLANS[number] = twin = object.__new__(type(self))  # without a handle: it must not keep itself alive
        twin.__dict__.update(self.__dict__)
        object.__setattr__(self, "handle", torch.tensor(number, device="cpu"))
        finalize(self.handle, _PLANS.pop, number).atexit = False

    def __reduce__(self):
        """Copies and what is unpickled are plans of their own, with a handle of their own."""
        return type(self), (self.tables, self.label_runs, self.batch, self.seq_len, self.documents)

    @classmethod
    def uniform(cls, tables: Tables, label: int, batch: int, seq_len: int) -> MaskPlan:
        """One label for the whole micro-batch."""
        return cls(tables, (LabelRun(label, 0, batch * seq_len),), batch, seq_len)

    @cached_property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    def check(self, x: torch.Tensor) -> None:
        """Raises ValueError where x [B, S, ...] is not of this micro-batch: a kernel would read beyond it."""
        if (shape := x.shape)[0] != self.batch or shape[1] != self.seq_len:
            raise ValueError(
                f"the plan is of {self.batch} sequences of {self.seq_len} tokens, the tensor of shape {tuple(shape)}"
            )

    def check_product(self, x: torch.Tensor, bias: torch.Tensor | None, inner: int, outer: int) -> None:
        """`check` for a weight from `inner` columns to `outer`: also where x or the bias has other columns."""
        if x.shape != (self.batch, self.seq_len, inner):
            self.check(x)
            raise ValueError(f"the weight takes {inner} columns, the tensor has shape {tuple(x.shape)}")
        if bias is not None and bias.shape != (outer,):
            raise ValueError(f"the weight gives {outer} columns, the bias has shape {tuple(bias.shape)}")

    def check_bounds(self, bounds: Sequence[int], size: int) -> None:
        """Raises ValueError where these are not the boundaries of one group or of all in `size` rows or columns."""
        groups = len(self.tables.groups)
        if bounds[-1] != size or bounds[0] != 0 or (len(bounds) != 2 and len(bounds) - 1 != groups):
            raise ValueError(f"group boundaries {tuple(bounds)} must cut {size} into 1 group or the plan's {groups}")

    @cached_property
    def present(self) -> tuple[int, ...]:
        """The labels of this micro-batch."""
        return tuple(sorted({run.label for run in self.label_runs}))

    @cached_property
    def whole_sequences(self) -> bool:
        """Whether every run begins and ends at a sequence boundary."""
        return all(run.end % self.seq_len == 0 for run in self.label_runs)

    def updaters(self, by_label: tuple[float, ...]) -> Updaters:
        """The tokens whose label has a non-zero weight; neighbouring runs of equal weight are one slice."""
        return self.cached(("updaters", by_label), lambda: self._updaters(by_label))

    def _updaters(self, by_label: tuple[float, ...]) -> Updaters:
        merged: list[Slice] = []
        for run in self.label_runs:
            weight = by_label[run.label]
            if weight == 0:
                continue
            if merged and merged[-1].end == run.start and merged[-1].weight == weight:
                merged[-1] = merged[-1]._replace(end=run.end)
            else:
                merged.append(Slice(run.start, run.end, weight))
        return Updaters(by_label, tuple(merged))

    def plain(self, tokens: Updaters) -> bool:
        """Whether these are all tokens with weight 1: nothing is masked."""
        return tokens.slices == ((0, self.tokens, 1.0),)

    def joint(self, kind: str) -> Updaters:
        """The tokens that may update the joint parameters of this kind."""
        try:
            return self._cache[kind]
        except KeyError:
            return self.cached(kind, lambda: self.updaters(self.tables.update_joint[kind]))

    def contributions(self, projection: str, groups: int) -> tuple[tuple[float, ...], ...]:
        """For each of the first `groups` groups, what a token contributes to the gradient of its rows, by label."""
        return self.tables.contributions[projection][:groups]

    def rows(self, projection: str, bounds: tuple[int, ...]) -> tuple[RowWork, ...]:
        """The work of one weight gradient: row ranges (group boundaries `bounds`), each with the tokens that update it.

        Neighbouring groups that the same tokens update become one range, so a plan that masks nothing yields one
        `RowWork` over all rows and all tokens.
        """
        return self.cached(("rows", projection, bounds), lambda: self._rows(projection, bounds))

    def _rows(self, projection: str, bounds: tuple[int, ...]) -> tuple[RowWork, ...]:
        work: list[RowWork] = []
        by_group = self.contributions(projection, len(bounds) - 1)
        for by_label, (start, end) in zip(by_group, pairwise(bounds), strict=True):
            tokens = self.updaters(by_label)
            if work and work[-1].tokens.slices == tokens.slices:
                work[-1] = work[-1]._replace(end=end)
            elif end > start:
                work.append(RowWork(start, end, tokens))
        return tuple(work)

    def column(self, table: str, group: int) -> tuple[float, ...]:
        """`active`, `route` or their product `passes` of one group, by label."""
        return self.tables.columns[table][group]

    def masks(self, by_group: Sequence[tuple[float, ...]]) -> bool:
        """Whether one of these factors, by group and label, differs from 1 for a token of this micro-batch."""
        return any(by_label[label] != 1 for by_label in by_group for label in self.present)

    def labels(self, device: torch.device) -> torch.Tensor:
        """int32 [tokens]: the label of each token; cached in the plan."""

        def make() -> torch.Tensor:
            # Named: on a default device of the process, repeat_interleave would wait for it.
            lengths = torch.tensor([run.end - run.start for run in self.label_runs], device="cpu")
            labels = torch.tensor([run.label for run in self.label_runs], dtype=torch.int32, device="cpu")
            return torch.repeat_interleave(labels, lengths).to(device, non_blocking=True)

        return self.cached(("labels", device), make)

    def token_weights(self, by_label: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
        """[tokens] tensor of each token's weight, in the dtype and on the device of `like`; cached in the plan."""
        dtype, device = like.dtype, like.device

        def make() -> torch.Tensor:
            return table_on(device, dtype, (by_label,))[0].index_select(0, self.labels(device))

        return self.cached((by_label, dtype, device), make)

    def factors(self, by_group: Sequence[tuple[float, ...]], device: torch.device) -> torch.Tensor:
        """fp32 [groups, tokens]: each token's factor for each group, what a kernel reads; cached in the plan.

        by_group  for every group its factors by label
        """
        by_group = tuple(by_group)

        def make() -> torch.Tensor:
            return table_on(device, torch.float32, by_group).index_select(1, self.labels(device))

        return self.cached((by_group, device), make)

    def mask(self, table: str, groups: int, device: torch.device) -> torch.Tensor | None:
        """`factors` of the first `groups` groups from `active`, `route`, `passes` or the contributions to a projection,
        or of a joint kind ([1, tokens]); None where all are 1, as in a layer of one group, whatever the tables say."""
        try:  # called by every op, so without the calls of `cached`
            return self._cache[table, groups, device]
        except KeyError:
            return self.cached((table, groups, device), lambda: self._mask(table, groups, device))

    def _mask(self, table: str, groups: int, device: torch.device) -> torch.Tensor | None:
        tables = self.tables
        by_group: tuple[tuple[float, ...], ...]
        if table in JOINT_KINDS:
            by_group = (tables.update_joint[table],)
        elif groups == 1:
            return None
        else:
            by_group = (tables.contributions if table in PROJECTIONS else tables.columns)[table][:groups]
        return self.factors(by_group, device) if self.masks(by_group) else None

    def spans(self, device: torch.device) -> torch.Tensor:
        """int32 [2, tokens]: where each token's document begins and ends in its sequence; cached in the plan."""

        def make() -> torch.Tensor:
            starts = range(0, self.tokens, self.seq_len)
            documents = self.documents or [(start, start + self.seq_len) for start in starts]
            spans = torch.tensor(documents, device="cpu")
            within = spans - spans[:, :1] // self.seq_len * self.seq_len
            by_token = torch.repeat_interleave(within.int(), spans[:, 1] - spans[:, 0], dim=0)
            return by_token.t().contiguous().to(device, non_blocking=True)

        return self.cached(("spans", device), make)

    def live(self, by_group: Sequence[tuple[float, ...]], device: torch.device) -> torch.Tensor:
        """int32 [2, groups, tokens]: the first token from each token on whose factor is not 0 (`tokens` if there is
        none), and the end of the last one up to it (0 if there is none); cached in the plan."""

        def make() -> torch.Tensor:
            counts = self.factors(by_group, device) != 0
            position = torch.arange(self.tokens, dtype=torch.int32, device=device)
            following = torch.where(counts, position, self.tokens).flip(1).cummin(1).values.flip(1)
            previous = torch.where(counts, position + 1, 0).cummax(1).values
            return torch.stack((following, previous)).int()

        return self.cached(("live", tuple(by_group), device), make)

    @property
    def by_token(self) -> torch.Tensor:
        """int32 [rows, tokens] on the CPU: all that a device needs of this plan besides the strategy's tables, to be
        copied with the batch: labels, and with documents where each token's begins and ends (`spans`)."""
        cpu = torch.device("cpu")
        labels = self.labels(cpu)[None]
        return labels if self.documents is None else torch.cat((labels, self.spans(cpu)))

    def arrived(self, by_token: torch.Tensor) -> None:
        """Store `by_token`, copied to a device, so that nothing of this plan is copied there again."""
        self._cache["labels", by_token.device] = by_token[0]
        if self.documents is not None:
            self._cache["spans", by_token.device] = by_token[1:]

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns for this key, made once: every layer of a model needs the same."""
        try:
            return self._cache[key]
        except KeyError:
            value = self._cache[key] = make()
            return value


_TABLES: dict[tuple, torch.Tensor] = {}


def table_on(device: torch.device, dtype: torch.dtype, by_group: tuple[tuple[float, ...], ...]) -> torch.Tensor:
    """[groups, labels] of a strategy, copied to a device once in the life of the process."""
    key = (device, dtype, by_group)
    if key in _TABLES:
        return _TABLES[key]
    with torch.inference_mode(False):
        table = torch.tensor(by_group, dtype=dtype, device=device)
    if type(table) is torch.Tensor:  # not one without data, of a trace
        _TABLES[key] = table
    return table


_NUMBERS = count()
_PLANS: dict[int, MaskPlan] = {}


def plan_of(handle: torch.Tensor) -> MaskPlan:
    """The plan with this `handle`."""
    return _PLANS[int(handle.item())]
