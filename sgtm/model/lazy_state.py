"""The state of a model that is larger than the memory: a mapping whose tensors are read when they are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch


class LazyState(Mapping[str, torch.Tensor]):
    """read  gives the tensor of a name, every time that it is taken; nothing is kept here"""

    def __init__(self, names: Iterable[str], read: Callable[[str], torch.Tensor]):
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
