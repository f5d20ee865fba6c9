"""The file of a direction: what is written is read, and what is damaged or does not fit is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import tiny_config

from sgtm.config.schema import Config
from sgtm.files import sha256_of
from sgtm.model.direction import IN_RUN, direction_of, keep_direction, layer_of, read_direction, write_direction

VECTORS = np.arange(18, dtype=np.float32).reshape(2, 9)
RECORD = {"domain": "es", "layer": 1, "run": "base"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_direction(tmp_path / "es.safetensors", VECTORS, RECORD)
    return tmp_path / "es.safetensors"


def config_of(file: Path | None, **keys) -> Config:
    return tiny_config(steering={"direction": file and str(file), **keys})


def test_what_is_written_is_read_and_the_bytes_are_always_the_same(file):
    direction = read_direction(file)
    assert np.array_equal(direction.vectors, VECTORS) and direction.vectors.dtype == np.float32
    assert (direction.record, direction.domain, direction.sha256) == (RECORD, "es", sha256_of(file))
    write_direction(file.with_name("again"), VECTORS.astype(np.float64), RECORD)
    assert file.with_name("again").read_bytes() == file.read_bytes()


def test_the_direction_of_a_config(file):
    assert direction_of(config_of(None)) is None
    direction = direction_of(config_of(file, layer=0))
    assert layer_of(config_of(file, layer=0), direction) == 0 and layer_of(config_of(file), direction) == 1
    elsewhere = file.rename(file.with_name("elsewhere"))
    assert direction_of(config_of(file), elsewhere).sha256 == direction.sha256


def refused(file: Path, message: str, **keys) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        direction_of(config_of(file, **keys))
    assert str(caught.value).startswith("steering.direction: ") and str(file) in str(caught.value)


def test_a_file_that_is_missing_or_damaged_is_refused(file):
    whole = file.read_bytes()
    for content in (b"", whole[:40], whole[:-4], b"\xff" * 100, b"text"):
        file.write_bytes(content)
        refused(file, r"is damaged, or no file of sgtm direction \(.*\); write it again")
    file.unlink()
    refused(file, "No such file or directory; write it with: sgtm direction RUN --out")
    file.mkdir()
    refused(file, "Is a directory")


@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        ("vector", {"direction": json.dumps(RECORD)}),
        ("direction", None),
        ("direction", {"direction": "{"}),
        ("direction", {"direction": "[1]"}),
        ("direction", {"direction": json.dumps({"domain": "es"})}),
        ("direction", {"direction": json.dumps({"domain": "es", "layer": "1"})}),
        ("direction", {"direction": json.dumps({"domain": 1, "layer": 1})}),
    ],
)
def test_a_file_of_another_program_is_refused(file, name, metadata):
    save_file({name: VECTORS}, file, metadata)
    refused(file, "is damaged, or no file of sgtm direction")


@pytest.mark.parametrize("vectors", [VECTORS.astype(np.float16), VECTORS[0], np.full_like(VECTORS, np.inf)])
def test_a_direction_that_is_no_finite_fp32_matrix_is_refused(file, vectors):
    save_file({"direction": vectors}, file, {"direction": json.dumps(RECORD)})
    refused(file, r"its direction is not a finite fp32 \[layers, hidden_size\]")


def test_what_does_not_fit_the_model_is_refused(file):
    write_direction(file, VECTORS[:1], RECORD)
    refused(file, "is of 1 layers and hidden size 9, but model.layers is 2 and model.hidden_size 9; measure it on")
    write_direction(file, VECTORS[:, :5], RECORD)
    refused(file, "is of 2 layers and hidden size 5, but model.layers is 2 and model.hidden_size 9")
    write_direction(file, VECTORS, RECORD | {"domain": "bio"})
    refused(file, "is of the domain 'bio', but masking.domains has es")
    for layer in (-1, 2):
        write_direction(file, VECTORS, RECORD | {"layer": layer})
        refused(file, f"is damaged: its layer is {layer}")
        assert direction_of(config_of(file, layer=1))
    write_direction(file, VECTORS * np.array([[0], [1]]), RECORD)
    refused(file, "is 0 after block 0; take another steering.layer", layer=0)


def test_a_run_keeps_a_copy(file, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    keep_direction(config_of(None), run)
    assert not list(run.iterdir())
    keep_direction(config_of(file), run)
    assert (run / IN_RUN).read_bytes() == file.read_bytes() and len(list(run.iterdir())) == 1
