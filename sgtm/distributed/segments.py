"""Where every element of every parameter lives in the tensors that DeepSpeed gives to the optimizer.

DeepSpeed replaces parameters by flat partitions whose borders fall anywhere. A `Fragment` is a stretch of one flattened
parameter and its offset in one such tensor; fragments come from DeepSpeed's own book-keeping (0.19):

    ZeRO 0                          the parameters themselves
    ZeRO 1, 2 and bf16 master      `param._hp_mapping`: the part of the parameter inside this rank's flat fp32 partition
    ZeRO 3                          `grad_position`: every parameter is cut into equal, padded parts, one for each rank

From fragments and the model's row layout follow the segment tables of sgtm/distributed/optim.py. Padding is in no
fragment. `check_cover` proves at every start that each element is owned exactly once; tests/dist/test_engine.py checks
the places themselves, by writing a pattern through the fragments and reading it back through the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from sgtm.distributed.optim import Segment
from sgtm.model.rows import Rows


class Fragment(NamedTuple):
    """Elements `start:end` of the flattened parameter `name` are elements `offset:offset + end - start` of `tensor`."""

    tensor: torch.Tensor
    offset: int
    name: str
    start: int
    end: int


def full_numel(parameter: torch.nn.Parameter) -> int:
    """Elements of the whole parameter, also where ZeRO-3 has left only a part of it here."""
    return getattr(parameter, "ds_numel", parameter.numel())


def fragments(optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> list[Fragment]:
    """This rank's fragments; `optimizer` is what DeepSpeed wrapped around the client optimizer, or that itself."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(_zero3_fragments(optimizer, parameters))
    if all(hasattr(parameter, "_hp_mapping") for parameter in parameters.values()):
        return list(_partition_fragments(optimizer, parameters))
    return [Fragment(p, 0, name, 0, p.numel()) for name, p in parameters.items()]


def _partition_fragments(optimizer, parameters) -> Iterable[Fragment]:
    for name, parameter in parameters.items():
        mapping = parameter._hp_mapping
        if mapping is not None:  # None: no element of it is in this rank's partition
            (flat,) = optimizer.param_groups[mapping.param_group_index]["params"]
            start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            yield Fragment(flat, mapping.hp_fragment_address.start, name, start, start + numel)


def _zero3_fragments(optimizer, parameters) -> Iterable[Fragment]:
    rank = torch.distributed.get_rank(optimizer.dp_process_group)
    for name, parameter in parameters.items():
        group, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start, end = rank * share, min((rank + 1) * share, parameter.ds_numel)
        if start < end:
            yield Fragment(optimizer.fp32_partitioned_groups_flat[group], offset, name, start, end)


def segment_tables(
    pieces: Iterable[Fragment], numels: Mapping[str, int], rows: Mapping[str, Rows]
) -> dict[torch.Tensor, list[Segment]]:
    """Segments of each tensor, in order: the fragments cut at the row boundaries of the keys.

    numels  elements of each whole parameter, by name. Raises ValueError where `rows` names other parameters or does not
            cover one exactly.
    """
    if set(rows) != set(numels):
        raise ValueError(f"parameter_rows() and named_parameters() differ in {sorted(set(rows) ^ set(numels))}")
    tables: dict[torch.Tensor, list[Segment]] = {}
    for tensor, offset, name, start, end in pieces:
        layout = rows[name]
        row_size, rest = divmod(numels[name], layout.bounds[-1])
        if rest or layout.bounds[0] != 0:
            raise ValueError(f"rows {layout.bounds} do not cover parameter {name!r} of {numels[name]} elements")
        table = tables.setdefault(tensor, [])
        for low, high, key in layout.segments(row_size):
            low, high = max(low, start), min(high, end)
            if low < high:
                table.append(Segment(offset + low - start, offset + high - start, key, layout.decay))
    return {tensor: sorted(table) for tensor, table in tables.items()}


def check_cover(pieces: Iterable[Fragment], numels: Mapping[str, int], replicas: int, all_reduce_sum) -> None:
    """Raise RuntimeError unless the fragments of all ranks own every element `replicas` times.

    all_reduce_sum  takes an int64 tensor and returns its sum over the ranks
    """
    owned = dict.fromkeys(numels, 0)
    ends: dict[torch.Tensor, int] = {}
    for tensor, offset, name, start, end in sorted(pieces, key=lambda piece: piece.offset):
        if offset < ends.get(tensor, 0) or offset + end - start > tensor.numel():
            raise RuntimeError(f"DeepSpeed's partitions overlap or end early at parameter {name!r}")
        ends[tensor] = offset + end - start
        owned[name] += end - start
    counts = all_reduce_sum(torch.tensor(list(owned.values()))).tolist()
    wrong = [name for name, count in zip(owned, counts, strict=True) if count != replicas * numels[name]]
    if wrong:
        raise RuntimeError(f"DeepSpeed's partitions do not cover {wrong} exactly once: unknown layout of this version")
