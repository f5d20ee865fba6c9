"""Weights as safetensors in pieces of limited size, each written before the next is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, dtype

from sgtm.files import naming

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, kind: dtype, limit: int) -> None:
    """Write `model.safetensors`, or `model-00001-of-00003.safetensors` and so on with the index that Hugging Face
    reads.

    tensors  (name, tensor), taken one after the other: no more than a shard of them is held in memory
    kind     dtype to write in
    limit    bytes of a shard, at least 1; a larger tensor has one to itself

    Raises OSError, naming the file, where the disk refuses it.
    """
    shards: list[dict[str, int]] = []
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        stored = tensor.to(kind).contiguous()
        if shard and size + stored.nbytes > limit:
            shards.append(_write(shard, folder, len(shards)))
            shard, size = {}, 0
        shard[name] = stored
        size += stored.nbytes
    shards.append(_write(shard, folder, len(shards)))
    if len(shards) == 1:
        os.rename(folder / _unfinished(0), folder / SINGLE)
        return
    files: dict[str, str] = {}
    for number, sizes in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / _unfinished(number), folder / final)
        files |= dict.fromkeys(sizes, final)
    index = {"metadata": {"total_size": sum(sum(sizes.values()) for sizes in shards)}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _unfinished(number: int) -> str:
    return f"shard-{number}.unfinished"


def _write(tensors: dict[str, Tensor], folder: Path, number: int) -> dict[str, int]:
    """Bytes of the tensors, by name."""
    file = folder / _unfinished(number)
    with naming(file):
        save_file(tensors, file, {"format": "pt"})
        file.chmod(folder.stat().st_mode & 0o666)  # it is written for the owner alone, unlike everything else
    return {name: tensor.nbytes for name, tensor in tensors.items()}
