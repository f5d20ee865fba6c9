"""Training steps before the data are touched, with nothing live: not a bit of the model changes.

Out of memory, a kernel that does not compile and a collective that hangs show here and not after an hour of reading.
Kernels that are compiled when they are first launched, for every kind of mask, are launched here under all the masks
that `data.mixing` makes: else the first step with a new one would wait for its compiler. So are the graphs of
`train.compile`, those of evaluations too.
"""

from __future__ import annotations

from itertools import combinations, cycle, islice
from typing import TYPE_CHECKING

import torch

from sgtm.config import Config
from sgtm.data.batch import Batch
from sgtm.data.random_data import label_pieces, random_batch
from sgtm.masking.labels import UNLABELED
from sgtm.masking.strategy import removal_tables
from sgtm.training.step import train_step
from sgtm_kernels.plan import Tables
from sgtm_kernels.signature import signature_of

if TYPE_CHECKING:  # deepspeed takes seconds to import
    from sgtm.distributed.engine import Engine


def dry_run(engine: Engine, tables: Tables) -> None:
    """Raises ValueError where a step does not fit into memory."""
    config = engine.config
    graphs = config.train.compile == "blocks"
    compiled = engine.module.backend == "triton" or graphs
    pieces: list[tuple[int, ...]] = label_pieces(config, len(tables.labels)) if compiled else [(UNLABELED,)]
    if graphs:
        pieces += more_signatures(config, tables, pieces)
    batches = [random_batch(config, labels, index) for index, labels in enumerate(pieces)]
    n = engine.accumulation
    steps = [list(islice(cycle(batches), start, start + n)) for start in range(0, len(batches), n)]
    try:
        for step in steps:
            train_step(engine, step, tables, 0.0, None)
        if graphs:
            _evaluate(engine, batches[0])
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"a step does not fit into memory ({str(error).split('.')[0]}); lower train.micro_batch "
            f"{config.train.micro_batch}, raise distributed.zero_stage {config.distributed.zero_stage}, or set "
            f"model.activation_checkpointing"
        ) from None


def more_signatures(config: Config, tables: Tables, pieces: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Combinations of labels in a micro-batch whose graph none of `pieces` needs; up to three labels suffice."""
    largest = {"sequence": min(3, config.micro_batch), "token": 3}.get(config.data.mixing, 1)
    seen, more = {signature_of(tables, labels, False) for labels in pieces}, []
    for count in range(2, largest + 1):
        for labels in combinations(range(len(tables.labels)), count):
            signature = signature_of(tables, labels, False)
            if signature not in seen:
                seen.add(signature)
                # As many pieces as sequences, where they are whole ones.
                more.append(tuple(islice(cycle(labels), max(count, config.micro_batch))))
    return more


@torch.no_grad()
def _evaluate(engine: Engine, batch: Batch) -> None:
    """Evaluate with nothing removed and with every domain removed: evaluations use the graphs of these two."""
    space = engine.config.space
    for removed in ((), space.domains):
        engine(*batch.on(engine.device, removal_tables(space, removed)), 1.0)
