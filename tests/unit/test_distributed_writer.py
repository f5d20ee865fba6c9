"""Files of a checkpoint, written in the background: they hold what was saved, whatever training does meanwhile."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from sgtm.distributed.writer import BackgroundWriter, Copies


def test_a_copy_has_no_tensor_and_no_container_in_common():
    weight = torch.ones(3, requires_grad=True)
    value = {"a": [weight, (1, {"b": weight})], "c": OrderedDict(d=[2])}
    taken = Copies().take(value)
    with torch.no_grad():
        weight.zero_()
    value["a"][1][1]["b"] = value["c"]["d"] = None
    assert taken["a"][0].tolist() == taken["a"][1][1]["b"].tolist() == [1.0, 1.0, 1.0]
    assert not taken["a"][0].requires_grad and taken["a"][1][0] == 1
    assert type(taken["c"]) is OrderedDict and taken["c"] == {"d": [2]}


def test_memory_of_copies_is_used_again_for_the_same_shapes():
    copies = Copies()
    first, second = copies.take([torch.ones(4), torch.ones(2)])
    assert first.data_ptr() != second.data_ptr()
    copies.give_back()
    again, other = copies.take([torch.zeros(4), torch.zeros(2, dtype=torch.int64)])
    assert again.data_ptr() == first.data_ptr() and again.tolist() == [0.0] * 4
    assert other.dtype == torch.int64 and other.tolist() == [0, 0]


def test_a_file_holds_what_was_saved_and_its_hash_is_that_of_the_file(tmp_path: Path):
    writer, weight = BackgroundWriter(), torch.ones(3)
    for number in range(2):  # one checkpoint after another
        file = tmp_path / f"{number}.pt"
        writer.save({"w": weight}, str(file))
        weight += 1
        writer.begin()
        files = writer.end()
        content = file.read_bytes()
        assert files == {file.name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
        assert torch.load(file)["w"].tolist() == [1.0 + number] * 3
        assert not writer.busy and writer.end() == {}


def test_an_error_is_raised_at_the_end_with_the_file_and_the_next_checkpoint_can_be_saved(tmp_path: Path):
    writer = BackgroundWriter()
    writer.save({"w": torch.ones(1)}, tmp_path / "nowhere" / "a.pt")
    writer.begin()
    with pytest.raises(OSError, match=r"^a\.pt: No such file or directory$"):
        writer.end()
    writer.save({"w": torch.ones(1)}, tmp_path / "b.pt")
    writer.begin()
    assert writer.end().keys() == {"b.pt"}
