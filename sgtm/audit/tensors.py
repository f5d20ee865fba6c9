"""The weights of an export, held against those of the run.

Every tensor is accounted for by name, shape, dtype and bytes, and is, bit for bit, what an export of the checkpoint
writes. That alone would trust the conversion; so every row and column is also compared with every weight vector of the
removed groups as the checkpoint has it, without any conversion.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sgtm.audit.record import written
from sgtm.config import Config
from sgtm.hf.shards import INDEX, SINGLE
from sgtm.model.transformer import Transformer

METADATA = {"format": "pt"}


class StoredTensors:
    """Tensors of a folder by name, read when they are taken.

    Raises ValueError naming the file for one that is none, an index that does not fit, and a tensor that is in two.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = sorted(folder.glob("*.safetensors"))
        if not self.files:
            raise ValueError(f"{folder}: no weights (*.safetensors)")
        self.headers = {file: _header(file) for file in self.files}
        self._file_of: dict[str, Path] = {}
        for file, header in self.headers.items():
            for name in header:
                if name == "__metadata__":
                    continue
                if name in self._file_of:
                    raise ValueError(f"{file}: tensor {name} is in {self._file_of[name].name} too")
                self._file_of[name] = file

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def where(self, name: str) -> str:
        return f"{self._file_of[name]}: tensor {name}"

    def read(self, name: str) -> Tensor:
        try:
            with safe_open(self._file_of[name], "pt") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.where(name)} cannot be read: {error}") from None


def layout_problems(weights: StoredTensors) -> list[str]:
    """Unexpected metadata, bytes that belong to no tensor, an index of other tensors."""
    problems = []
    for file, header in weights.headers.items():
        if header.get("__metadata__") != METADATA:
            problems.append(f"{file}: metadata {header.get('__metadata__')!r}, should be {METADATA}")
        spans = sorted(entry["data_offsets"] for entry in _entries(header))
        starts, text = [0, *(end for _, end in spans)], _header_text(file)
        if [start for start, _ in spans] != starts[:-1] or 8 + len(text) + starts[-1] != file.stat().st_size:
            problems.append(f"{file}: bytes that belong to no tensor, or to two")
        if text.rstrip(b" ") != json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False).encode():
            problems.append(f"{file}: its header is not written as safetensors writes it: repeated or hidden keys")
    index = weights.folder / INDEX
    names = {name: weights.where(name).partition(": ")[0].rpartition("/")[2] for name in weights}
    if index.is_file():
        try:
            index_text = index.read_text(encoding="utf-8")
            content = json.loads(index_text)
            listed = content["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            return [*problems, f"{index}: no index of weights: {error!r}"]
        spans = [entry["data_offsets"] for header in weights.headers.values() for entry in _entries(header)]
        total = sum(end - start for start, end in spans)
        if content != {"metadata": {"total_size": total}, "weight_map": listed} or index_text != written(content, 2):
            problems.append(f"{index}: it holds more than the files of the tensors and their size, {total:,} bytes")
        problems += [
            f"{index}: {name} is in {listed.get(name)}, should be in {file}"
            for name, file in names.items()
            if listed.get(name) != file
        ]
        problems += [f"{index}: no file holds {name}" for name in listed if name not in names]
    elif [file.name for file in weights.files] != [SINGLE]:
        problems.append(f"{index}: missing, though there are {len(weights.files)} files of weights")
    return problems


def value_problems(weights: StoredTensors, exported: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> list[str]:
    """Tensors that are missing, too many, or not those that an export writes, which come one after the other."""
    problems, left = [], set(weights)
    for name, tensor in exported:
        if name not in left:
            problems.append(f"{weights.folder}: no tensor {name}")
            continue
        left.remove(name)
        stored, expected = weights.read(name), tensor.to(dtype)
        if stored.shape != expected.shape or stored.dtype != dtype:
            problems.append(
                f"{weights.where(name)} is {stored.dtype} {list(stored.shape)}, should be {dtype} "
                f"{list(expected.shape)}"
            )
            continue
        different = stored.view(_bits(dtype)) != expected.contiguous().view(_bits(dtype))
        if count := int(different.sum()):
            problems.append(
                f"{weights.where(name)}: {count:,} of {stored.numel():,} elements differ from the checkpoint's, first "
                f"at {different.nonzero()[0].tolist()}"
            )
    return problems + [f"{weights.where(name)}: the model has no such tensor" for name in sorted(left)]


def removed_vectors(
    weights: StoredTensors, config: Config, state: Mapping[str, Tensor], domains: Iterable[str], dtype: torch.dtype
) -> list[str]:
    """Where a weight vector of a removed group was found, as a row or a column.

    A vector is a row of the group in a matrix of the checkpoint; those that are all zero do not count.
    """
    with torch.device("meta"):
        rows = Transformer(config.model, config.partition, "torch").parameter_rows()
    endings = tuple(f".{domain}" for domain in domains)
    vectors: dict[bytes, str] = {}
    for name, ranges in rows.items():
        owned = [
            (a, b)
            for key, a, b in zip(ranges.keys, ranges.bounds[:-1], ranges.bounds[1:], strict=True)
            if key.endswith(endings)
        ]
        for start, end in owned:
            tensor = state[name]
            if tensor.dim() == 2:
                for number, digest in _digests(tensor[start:end].to(dtype)):
                    vectors[digest] = f"{name} row {start + number}"
    problems = []
    for name in weights if vectors else ():
        tensor = weights.read(name)
        if tensor.dim() < 2:
            continue
        matrices = tensor.flatten(0, -3) if tensor.dim() > 2 else tensor[None]  # one of each expert
        for number, one in enumerate(matrices):
            of = f" of matrix {number}" if len(matrices) > 1 else ""
            for kind, matrix in (("row", one), ("column", one.t())):
                hit = next(((n, vectors[digest]) for n, digest in _digests(matrix) if digest in vectors), None)
                if hit:
                    problems.append(f"{weights.where(name)}: {kind} {hit[0]}{of} is the removed {hit[1]}")
    return problems


def _digests(matrix: Tensor) -> Iterator[tuple[int, bytes]]:
    """(number, digest) of the rows that are not all zero."""
    bits = matrix.contiguous().view(_bits(matrix.dtype)).numpy()
    for number in np.flatnonzero((bits != 0).any(1)):
        yield int(number), hashlib.blake2b(bits[number].tobytes(), digest_size=16).digest()


def _bits(dtype: torch.dtype) -> torch.dtype:
    return {4: torch.int32, 2: torch.int16}[dtype.itemsize]


def _header(file: Path) -> dict:
    try:
        header = json.loads(_header_text(file))
        with safe_open(file, "pt"):
            return header
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{file}: not a file of weights: {error}") from None


def _entries(header: dict) -> list[dict]:
    return [entry for name, entry in header.items() if name != "__metadata__"]


def _header_text(file: Path) -> bytes:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size - 8:
            raise ValueError(f"a header of {length:,} bytes in a file of {file.stat().st_size:,}")
        return opened.read(length)
