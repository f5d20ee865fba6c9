"""DeepSpeed's universal checkpoint, written from one of ZeRO 0; tests/dist/test_storage.py has the other stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sgtm.distributed import universal
from sgtm.distributed.universal import universal_info, write_universal

WEIGHT = torch.arange(6.0).view(2, 3)
MOMENTS = {"exp_avg": WEIGHT + 10, "exp_avg_sq": WEIGHT + 20}
COUNTS = torch.tensor([7, 8])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of one parameter and one buffer."""
    folder = tmp_path / "saved"
    folder.mkdir()
    state = {
        "sgtm": {"state": {}, "optimizer_steps": {}},
        "module": {"w": WEIGHT, "counts": COUNTS},
        "buffer_names": ["counts"],
        "param_shapes": None,
        "optimizer": {"state": {0: MOMENTS}, "param_groups": [{"lr": 0.5}], "clip_grad": 3.0, "other": 1},
        "ds_version": "0.19",
    }
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    return folder


def test_every_part_of_a_parameter_is_a_file_of_its_shape(saved: Path, tmp_path: Path):
    write_universal(saved, tmp_path / "out")
    for part, values in {"fp32": WEIGHT, **MOMENTS}.items():
        content = torch.load(tmp_path / "out" / "zero" / "w" / f"{part}.pt")
        assert content.keys() == {"param", "cat_dim"} and content["cat_dim"] == 0
        assert torch.equal(content["param"], values) and content["param"].shape == (2, 3)
    optimizer = torch.load(tmp_path / "out" / "zero" / "optimizer_state.pt")
    assert optimizer == {"clip_grad": 3.0, "ds_version": "0.19", "param_groups": [{"lr": 0.5}]}
    model = torch.load(tmp_path / "out" / "mp_rank_00_model_states.pt")
    assert torch.equal(model["module"]["w"], WEIGHT) and model["module"]["counts"].tolist() == [7.0, 8.0]
    assert model["optimizer"] is None and universal_info().items() <= model.items()


def test_a_folder_that_is_begun_is_gone_after_an_error(saved: Path, tmp_path: Path, monkeypatch):
    def full(value, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    (tmp_path / ".out.tmp").mkdir()  # of a call that was killed
    monkeypatch.setattr(universal.torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_universal(saved, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [saved]
