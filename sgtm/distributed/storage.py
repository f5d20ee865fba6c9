"""The files of a checkpoint, as DeepSpeed lays them out, put together without it."""

from __future__ import annotations

import math
from pathlib import Path

import torch


def consolidate(directory: Path | str) -> dict[str, torch.Tensor]:
    """The module's whole state in fp32 from a checkpoint of any stage and number of ranks: name -> tensor on the CPU.

    Needs no process group. Reads the fp32 weights of the optimizer where there are some, else the module's.
    (DeepSpeed's own script does not know its bf16 optimizer.) Raises ValueError where there is no DeepSpeed checkpoint.
    """
    directory = Path(directory)
    states = sorted(directory.glob("*mp_rank_00_model_states.pt"))
    if not states:
        raise ValueError(f"{directory} holds no checkpoint: no file *mp_rank_00_model_states.pt")
    model = _read(next((file for file in states if "_pp_rank_0_" in file.name), states[0]))
    shards = sorted(directory.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank)
    if not shards:
        return {name: tensor.float() for name, tensor in model["module"].items()}
    parts = [_read(shard)["optimizer_state_dict"] for shard in shards]
    buffers = {name: model["module"][name].float() for name in model["buffer_names"]}
    shapes = model["param_shapes"]
    zero3 = "fp32_flat_groups" in parts[0]
    return buffers | (_join_parts if zero3 else _join_partitions)(parts, shapes)


def _join_partitions(parts: list[dict], shapes: list[dict]) -> dict[str, torch.Tensor]:
    """ZeRO 1 and 2: the ranks' partitions of a group, one after the other, are its parameters, one after the other."""
    joined = {}
    for group, by_name in enumerate(shapes):
        flat = torch.cat([part["single_partition_of_fp32_groups"][group].detach() for part in parts])
        sizes = [shape.numel() for shape in by_name.values()]
        pieces = flat[: sum(sizes)].split(sizes)
        joined |= {name: t.view(shape).clone() for (name, shape), t in zip(by_name.items(), pieces, strict=True)}
    return joined


def _join_parts(parts: list[dict], shapes: list[dict]) -> dict[str, torch.Tensor]:
    """ZeRO 3: every parameter is cut into as many equal parts as there are ranks, the last ones padded."""
    joined, offset = {}, 0
    flats = [torch.cat([t.detach() for t in part["fp32_flat_groups"]]) for part in parts]
    for name, shape in ((name, shape) for by_name in shapes for name, shape in by_name.items()):
        part = math.ceil(shape.numel() / len(flats))
        whole = torch.cat([flat[offset : offset + part] for flat in flats])
        joined[name] = whole[: shape.numel()].view(shape).clone()
        offset += part
    return joined


def _read(file: Path) -> dict:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


def _rank(file: Path) -> int:
    return int(file.name.partition("zero_pp_rank_")[2].partition("_")[0])
