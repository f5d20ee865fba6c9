"""Which parameters a domain's own part of embedding and head has (sgtm/model/domain_embedding.py); without torch."""

from __future__ import annotations

from typing import NamedTuple

from sgtm.masking.partition import ENDS, Partition


class Part(NamedTuple):
    """One parameter of a domain's part: attribute of the model, shape, key of its rows (sgtm/model/rows.py)."""

    name: str
    shape: tuple[int, int]
    key: str


def ends(tied: bool) -> tuple[str, ...]:
    """The matrices that have parts of their own."""
    return ENDS[:1] if tied else ENDS


def domain_parts(partition: Partition, vocab: int, width: int, tied: bool) -> list[Part]:
    """Parameters of all domains' parts, in a fixed order."""
    rank, parts = partition.embedding, []
    if rank == "none":
        return []
    for group, name in enumerate(partition.groups[1:], start=1):
        for end in ends(tied):
            own, key = f"{end}_{group}", f"{end}.{name}"
            if rank == "full":
                parts.append(Part(own, (vocab, width), key))
            else:
                parts += [Part(f"{own}_rows", (vocab, rank), key), Part(f"{own}_basis", (rank, width), key)]
    return parts
