"""The files of a checkpoint, as DeepSpeed lays them out, read without it: any stage, any number of ranks.

Every stage cuts the flattened parameters differently. What the files hold is found by parameter and element range
(`Stored.read`), so a run resumes in another stage and on another number of ranks without a conversion: each rank reads
what it owns now. DeepSpeed's own loaders do not cross from ZeRO 3 to 1 or 2, and know no checkpoint of ZeRO 0.
`sgtm/distributed/universal.py` writes the same as DeepSpeed's universal checkpoint. Tests: tests/dist/test_storage.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from sgtm.model.lazy_state import LazyState

STATE_TENSORS = ("fp32", "exp_avg", "exp_avg_sq")
WEIGHTS = "model.safetensors"
"""Of a checkpoint that holds weights alone (sgtm/run/weights_only.py)."""


class ShardRange(NamedTuple):
    """Elements `start:end` of a flattened parameter are in a shard's tensors of `group`, from `offset`."""

    start: int
    end: int
    shard: int
    group: int
    offset: int


class Stored:
    """What a checkpoint holds of each parameter. Files are mapped, and opened only where something of them is read.

    shapes     of the parameters, by name, in the order of the model
    buffers    of the module, fp32, by name
    client     what `Engine.save` was given beside the weights: {"state", "optimizer_steps"}
    model      DeepSpeed's state of the model, of rank 0
    optimizer  and of the optimizer

    Needs no process group. Raises ValueError where there is no DeepSpeed checkpoint.
    """

    def __init__(self, directory: Path | str):
        directory = Path(directory)
        states = sorted(directory.glob("*mp_rank_00_model_states.pt"))
        if not states and (directory / WEIGHTS).exists():
            raise ValueError(f"{directory} holds weights alone ({WEIGHTS}), without the state of an optimizer")
        if not states:
            raise ValueError(f"{directory} holds no checkpoint: no file *mp_rank_00_model_states.pt")
        self.model = _read(next((file for file in states if "_pp_rank_0_" in file.name), states[0]))
        self.client, module = self.model["sgtm"], self.model["module"]
        self.buffers = {name: module[name].float() for name in self.model["buffer_names"]}
        self._files = sorted(directory.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank)
        self._open: dict[int, dict] = {}
        self.optimizer = self._shard(0) if self._files else self.model["optimizer"]
        self._zero3 = "fp32_flat_groups" in self.optimizer
        groups = self.model["param_shapes"] or [
            {name: tensor.shape for name, tensor in module.items() if name not in self.buffers}
        ]
        self.shapes: dict[str, torch.Size] = {name: shape for group in groups for name, shape in group.items()}
        self._pieces: dict[str, list[ShardRange]] = {name: [] for name in self.shapes}
        for name, piece in self._find(groups):
            self._pieces[name].append(piece)

    def read(self, name: str, state: str, start: int = 0, end: int | None = None) -> torch.Tensor:
        """fp32 [end - start]: elements of a state tensor of a flattened parameter. Raises ValueError for a gap."""
        end = self.shapes[name].numel() if end is None else end
        out, filled = torch.empty(end - start), 0
        for piece in self._pieces[name]:
            low, high = max(start, piece.start), min(end, piece.end)
            if low < high:
                offset = piece.offset + low - piece.start
                source = self._tensor(name, piece, state)
                out[low - start : high - start] = source[offset : offset + high - low]
                filled += high - low
        if filled != end - start:
            raise ValueError(f"the checkpoint holds {filled} of elements {start}:{end} of {state} of {name!r}")
        return out

    def _find(self, groups: list[dict]) -> Iterator[tuple[str, ShardRange]]:
        if not self._files:  # ZeRO 0: whole tensors, moments by the number of the parameter
            for number, (name, shape) in enumerate(self.shapes.items()):
                yield name, ShardRange(0, shape.numel(), 0, number, 0)
            return
        for group, by_name in enumerate(groups):
            size = self._state(0)[group]["exp_avg"].numel()
            cut = _of_parts if self._zero3 else _of_partitions
            for name, piece in cut(len(self._files), size, by_name):
                yield name, piece._replace(group=group)

    def _tensor(self, name: str, piece: ShardRange, state: str) -> torch.Tensor:
        """Flattened."""
        if state != "fp32":
            tensor = self._state(piece.shard)[piece.group][state]
        elif not self._files:
            tensor = self.model["module"][name]
        else:
            key = "fp32_flat_groups" if self._zero3 else "single_partition_of_fp32_groups"
            tensor = self._shard(piece.shard)[key][piece.group]
        return tensor.detach().reshape(-1)

    def _state(self, shard: int) -> dict[int, dict]:
        if not self._files:
            return self.optimizer["state"]
        return self._shard(shard)["optimizer_state_dict" if self._zero3 else "base_optimizer_state"]["state"]

    def _shard(self, number: int) -> dict:
        if number not in self._open:
            self._open[number] = _read(self._files[number])["optimizer_state_dict"]
        return self._open[number]


def stored_weights(directory: Path | str) -> LazyState:
    """The module's whole state in fp32 in a checkpoint of any stage and number of ranks, on the CPU; a tensor is read
    when it is taken.

    Reads the fp32 weights of the optimizer where there are some, else the module's; of a checkpoint of weights alone
    its one file. Raises ValueError as `Stored` does.
    """
    if (file := Path(directory) / WEIGHTS).exists():
        return _of_file(file)
    stored = Stored(directory)

    def read(name: str) -> torch.Tensor:
        return stored.buffers[name] if name in stored.buffers else stored.read(name, "fp32").view(stored.shapes[name])

    return LazyState((*stored.buffers, *stored.shapes), read)


def _of_file(file: Path) -> LazyState:
    """fp32 tensors of a file of safetensors, read and not mapped: to map a file that is larger than the memory may be
    refused, and mapped weights that are written to count as the process's own.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entries = json.loads(opened.read(length))
    entries.pop("__metadata__", None)

    def read(name: str) -> torch.Tensor:
        start, end = entries[name]["data_offsets"]
        tensor = torch.empty(entries[name]["shape"], dtype=torch.float32)
        assert entries[name]["dtype"] == "F32" and tensor.nbytes == end - start  # as sgtm/run/weights_only.py writes it
        with file.open("rb") as opened:
            opened.seek(8 + length + start)
            opened.readinto(tensor.view(-1).numpy().data.cast("B") if end > start else bytearray())
        return tensor

    return LazyState(entries, read)


def _of_partitions(ranks: int, size: int, by_name: dict) -> Iterator[tuple[str, ShardRange]]:
    """ZeRO 1 and 2: the parameters, one after the other, are cut into one partition of `size` for each rank."""
    before = 0
    for name, shape in by_name.items():
        for rank in range(before // size, ranks):
            first = rank * size - before
            start, end = max(first, 0), min(first + size, shape.numel())
            if start >= end:
                break
            yield name, ShardRange(start, end, rank, 0, start - first)
        before += shape.numel()


def _of_parts(ranks: int, size: int, by_name: dict) -> Iterator[tuple[str, ShardRange]]:
    """ZeRO 3: every parameter is cut into as many equal parts as there are ranks, the last ones padded."""
    offset = 0
    for name, shape in by_name.items():
        share = math.ceil(shape.numel() / ranks)
        for rank in range(ranks):
            start, end = rank * share, min((rank + 1) * share, shape.numel())
            if start < end:
                yield name, ShardRange(start, end, rank, 0, offset)
        offset += share


def _read(file: Path) -> dict:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


def _rank(file: Path) -> int:
    return int(file.name.partition("zero_pp_rank_")[2].partition("_")[0])
