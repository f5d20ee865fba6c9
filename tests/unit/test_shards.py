"""sgtm/hf/shards.py: files of limited size that Hugging Face finds by their index."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sgtm.hf.shards import INDEX, SINGLE, write_shards

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4), "c": torch.full((3,), -2.5), "d": torch.zeros(1)}


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_what_fits_is_one_file(tmp_path):
    write_shards(TENSORS.items(), tmp_path, torch.float32, 56)
    assert names(tmp_path) == [SINGLE]
    assert {name: tensor.tolist() for name, tensor in load_file(tmp_path / SINGLE).items()} == {
        name: tensor.tolist() for name, tensor in TENSORS.items()
    }


def test_a_shard_ends_before_it_is_too_large_and_a_large_tensor_has_one_to_itself(tmp_path):
    write_shards(TENSORS.items(), tmp_path, torch.float32, 20)
    files = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert names(tmp_path) == [*files, INDEX]
    assert [sorted(load_file(tmp_path / file)) for file in files] == [["a"], ["b"], ["c", "d"]]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 56}
    assert index["weight_map"] == {"a": files[0], "b": files[1], "c": files[2], "d": files[2]}


def test_the_dtype_is_that_of_the_files_and_of_their_size(tmp_path):
    write_shards(TENSORS.items(), tmp_path, torch.bfloat16, 20)
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert names(tmp_path) == [*files, INDEX]
    assert {tensor.dtype for file in files for tensor in load_file(tmp_path / file).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / INDEX).read_text())["metadata"] == {"total_size": 28}


def test_a_shard_is_written_before_the_next_is_read(tmp_path):
    written: list[int] = []

    def read():
        for name, tensor in TENSORS.items():
            written.append(len(names(tmp_path)))
            yield name, tensor

    write_shards(read(), tmp_path, torch.float32, 20)
    assert written == [0, 0, 1, 2]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_are_readable_for_whom_the_umask_lets(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        folder = tmp_path / "out"
        folder.mkdir()
        write_shards(TENSORS.items(), folder, torch.float32, 20)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {mode}


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sgtm.hf.shards.save_file", full)
    with pytest.raises(OSError, match="No space left") as raised:
        write_shards(TENSORS.items(), tmp_path, torch.float32, 20)
    assert raised.value.filename == str(tmp_path / "shard-0.unfinished")
