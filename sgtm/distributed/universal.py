"""A checkpoint as DeepSpeed's universal checkpoint, for programs that read that."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    CAT_DIM,
    OPTIMIZER_STATE_DICT,
    PARAM,
    PARAM_GROUPS,
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)

from sgtm.distributed.storage import STATE_TENSORS, Stored

# Of a rank's optimizer state what is the same on all ranks, as DeepSpeed's converter keeps it.
COMMON = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad", "zero_stage")


def universal_info() -> dict:
    """What DeepSpeed looks for in a checkpoint before it converts one: nothing here is split but by ZeRO."""
    return {UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}}


def write_universal(directory: Path | str, out: Path) -> None:
    """Write the checkpoint of any stage and number of ranks into the folder `out`, which is made.

    `zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt`, fp32 of the parameter's shape, `zero/optimizer_state.pt` and
    `mp_rank_00_model_states.pt`, which has the weights once more. The folder is there when it is whole. Raises
    ValueError where there is no checkpoint, FileExistsError where `out` is there.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; name a folder that does not")
    begun = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(begun, ignore_errors=True)
    try:
        _write(Stored(directory), begun)
        begun.rename(out)
    except BaseException:
        shutil.rmtree(begun, ignore_errors=True)
        raise


def _write(stored: Stored, out: Path) -> None:
    out.mkdir(parents=True)
    for name, shape in stored.shapes.items():
        folder = out / "zero" / name
        folder.mkdir(parents=True)
        for part in STATE_TENSORS:
            torch.save({PARAM: stored.read(name, part).view(shape), CAT_DIM: 0}, folder / f"{part}.pt")
    state = stored.optimizer
    base = state.get(BASE_OPTIMIZER_STATE) or state.get(OPTIMIZER_STATE_DICT) or state
    common = {key: state[key] for key in COMMON if key in state}
    common["ds_version"] = stored.model["ds_version"]
    torch.save({**common, PARAM_GROUPS: base[PARAM_GROUPS]}, out / "zero" / "optimizer_state.pt")
    weights = {name: stored.read(name, "fp32").view(shape) for name, shape in stored.shapes.items()}
    model = {**stored.model, **universal_info(), "module": stored.buffers | weights, "optimizer": None}
    torch.save(model, out / "mp_rank_00_model_states.pt")
