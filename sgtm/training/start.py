"""The start of a run: its corpus, its model, and steps that change nothing, before the first one that counts.

The corpus is opened so that every rank reads the same and no node reads what is damaged. The model is built as
training, benchmark and profile take it. In the steps of the dry run nothing is live: not a bit of the model changes,
but out of memory, a kernel that does not compile and a collective that hangs show here and not after an hour of
reading. Kernels that are compiled when they are first launched, for every kind of mask, are launched here under all the
masks that `data.mixing` makes: else the first step with a new one would wait for its compiler. So are the graphs of
`train.compile`, those of evaluations too.
"""

from __future__ import annotations

import json
import socket
from itertools import combinations, cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sgtm.config import Config
from sgtm.data.batch import Batch
from sgtm.data.open import open_corpus
from sgtm.data.random_data import label_pieces, random_batch
from sgtm.data.store import Corpus
from sgtm.distributed.env import device_type, kernel_backend
from sgtm.distributed.on_ranks import on_every_rank, on_rank_zero, together
from sgtm.masking.labels import UNLABELED
from sgtm.model.compile import check_compiler, compile_blocks
from sgtm.model.direction import direction_of
from sgtm.model.steering import Steering
from sgtm.model.transformer import Transformer
from sgtm.process.ranks import RankInfo
from sgtm.training.step import train_step
from sgtm_kernels.plan import Tables
from sgtm_kernels.signature import signature_of

if TYPE_CHECKING:  # deepspeed takes seconds to import
    from sgtm.distributed.engine import Engine


def open_everywhere(config: Config, rank_info: RankInfo) -> Corpus:
    """The corpus on every rank, after rank 0 has written it where it is a synthetic one and not there yet.

    The first rank of every node reads all files and checks their hashes, as nodes may have copies of their own; the
    other ranks check the sizes. Every rank raises ValueError, with the rank and its host, where one finds it missing or
    damaged, or has another corpus than rank 0.
    """
    on_rank_zero(lambda: str(open_corpus(config).path))
    if rank_info.world_size == 1:
        return open_corpus(config, "sizes")  # the hashes have just been checked
    checks = rank_info.local_rank == 0 and rank_info.rank != 0

    def opened() -> Corpus:
        try:
            return open_corpus(config, "hashes" if checks else "sizes")
        except ValueError as error:
            raise ValueError(f"on host {socket.gethostname()}: {error}") from error

    corpus = together(opened)
    copies = on_every_rank(lambda: (corpus.fingerprint, socket.gethostname()))

    def compare() -> None:
        for rank, (fingerprint, host) in enumerate(copies):
            if fingerprint != copies[0][0]:
                raise ValueError(
                    f"{corpus.path} is another corpus on host {host} (rank {rank}, {fingerprint[:16]}...) than on host "
                    f"{copies[0][1]} (rank 0, {copies[0][0][:16]}...); copy the same to every node"
                )

    on_rank_zero(compare)
    return corpus


def initial_model(config: Config) -> Transformer:
    """Random weights from `train.seed`, blocks compiled where `train.compile` asks for it, with the direction of
    `steering`. A collective call.

    Raises ValueError where blocks cannot be compiled here, and for a direction that is missing or does not fit.
    """
    compiled = config.train.compile == "blocks"
    if compiled:
        together(lambda: check_compiler(device_type(), kernel_backend(config.kernels, config.train.precision)))
    torch.manual_seed(config.train.seed)
    model = Transformer(config.model, config.partition, kernel_backend(config.kernels, config.train.precision))
    model.steering = together(lambda: Steering.of(config, direction_of(config)))
    if compiled:
        compile_blocks(model)
    return model


def export_record(config: Config) -> dict | None:
    """`sgtm_export.json` of the folder that `train.init_from` names; None if it names none, or a model without one.

    A damaged file is an empty record: it certifies nothing.
    """
    if not config.train.init_from:
        return None
    try:
        record = json.loads((Path(config.train.init_from) / "sgtm_export.json").read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


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
    config = engine.config
    for removed in ((), config.space.domains):
        engine(*batch.on(engine.device, config.removal_tables(removed)), 1.0)
