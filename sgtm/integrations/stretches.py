"""Where ranges of rows or columns of a parameter lie in the tensor that holds it, or a part of it.

A range of columns of an [out, in] weight would be `out` ranges of the flattened one, a quarter of a million in a model
of 32 layers of width 4096: a `Stretch` is a strided view instead, which the update of torch takes as it is. DeepSpeed
flattens parameters and cuts them at any element, so that a range of columns becomes three views at most; FSDP2 cuts
them between rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Owned:
    """Who owns a parameter: the ranges `bounds[i]:bounds[i + 1]` of dimension `dim` have key `keys[i]`.

    What has one key is updated, or frozen, together; of a masked model, keys are those of `sgtm.model.rows`.
    rows, columns  shape of the whole parameter; columns 1 of a vector
    """

    dim: int
    bounds: tuple[int, ...]
    keys: tuple[str, ...]
    rows: int
    columns: int = 1

    def ranges(self) -> Iterator[tuple[str, int, int]]:
        """Key, start and end of each, in order."""
        yield from zip(self.keys, self.bounds[:-1], self.bounds[1:], strict=True)


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


def stretches(owned: Owned, first: int = 0, last: int | None = None, offset: int = 0) -> Iterator[Stretch]:
    """Stretches of a tensor that has elements `first:last` of the flattened parameter from element `offset` on."""
    width = owned.columns
    last = owned.rows * width if last is None else last
    if first == last:
        return
    shift = offset - first
    if owned.dim == 0:
        for key, start, end in owned.ranges():
            low, high = max(start * width, first), min(end * width, last)
            if low < high:
                yield Stretch(key, low + shift, 1, high - low, high - low)
        return
    row, final = first // width, (last - 1) // width
    middle = range(row + (first % width != 0), final + (last % width == 0))  # whole rows
    for key, start, end in owned.ranges():
        for line in sorted({row, final}):
            if line in middle:
                continue
            low, high = max(line * width + start, first), min(line * width + end, last)
            if low < high:
                yield Stretch(key, low + shift, 1, high - low, high - low)
        if len(middle) and start < end:
            yield Stretch(key, middle[0] * width + start + shift, len(middle), end - start, width)


def merged(apart: list[Stretch], live: frozenset[str], steps: Mapping[str, int]) -> Iterator[Stretch]:
    """Live stretches, neighbours with as many updates in one: a launch less for each."""
    waiting: Stretch | None = None
    for stretch in apart:
        if stretch.key not in live:
            continue
        if waiting is not None and steps[waiting.key] == steps[stretch.key]:
            joined = _joined(waiting, stretch)
            if joined is not None:
                waiting = joined
                continue
        if waiting is not None:
            yield waiting
        waiting = stretch
    if waiting is not None:
        yield waiting


def _joined(first: Stretch, second: Stretch) -> Stretch | None:
    """Two stretches as one, where the second is what follows the first, or beside it in the same rows."""
    if first.contiguous and second.contiguous:
        size = first.rows * first.columns
        if first.offset + size != second.offset:
            return None
        size += second.rows * second.columns
        return Stretch(first.key, first.offset, 1, size, size)
    if first.rows == second.rows and first.stride == second.stride and first.offset + first.columns == second.offset:
        return first._replace(columns=first.columns + second.columns)
    return None
