"""sgtm/audit/tensors.py: weights of a folder as they are stored. Whole exports: tests/unit/test_audit.py."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from sgtm.audit.tensors import StoredTensors, layout_problems, value_problems
from sgtm.hf.shards import INDEX, write_shards

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([-0.0, 1.0])}


def written(folder, **changes):
    write_shards((TENSORS | changes).items(), folder, torch.float32, 10**9)
    return StoredTensors(folder)


def test_what_an_export_writes_has_no_problem(tmp_path):
    stored = written(tmp_path)
    assert layout_problems(stored) == [] == value_problems(stored, TENSORS.items(), torch.float32)
    assert sorted(stored) == ["a", "b"] and torch.equal(stored.read("a"), TENSORS["a"])


def test_bits_are_compared_and_not_values(tmp_path):
    stored = written(tmp_path, b=torch.tensor([0.0, 1.0]))
    (problem,) = value_problems(stored, TENSORS.items(), torch.float32)
    assert problem.endswith("tensor b: 1 of 2 elements differ from the checkpoint's, first at [0]")


def test_a_tensor_in_two_files_is_an_error(tmp_path):
    for name in ("one", "two"):
        save_file({"a": TENSORS["a"]}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"tensor a is in one\.safetensors too"):
        StoredTensors(tmp_path)


def test_a_gap_between_tensors_is_found(tmp_path):
    """Written by hand: safetensors would neither write nor read it."""
    stored = written(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["b"]["data_offsets"] = [28, 36]
    stored.headers[file] = header
    assert layout_problems(stored) == [f"{file}: bytes that belong to no tensor, or to two"]


def test_several_files_need_an_index(tmp_path):
    write_shards(TENSORS.items(), tmp_path, torch.float32, 24)
    stored = StoredTensors(tmp_path)
    assert layout_problems(stored) == []
    (tmp_path / INDEX).unlink()
    assert layout_problems(stored) == [f"{tmp_path / INDEX}: missing, though there are 2 files of weights"]


def test_a_folder_without_weights_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no weights"):
        StoredTensors(tmp_path)
