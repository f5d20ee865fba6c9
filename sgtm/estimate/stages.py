"""What each ZeRO stage would need and how fast it would be, which one to take, and what to change where none fits.

What does not divide or does not fit is an error before anything is allocated.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from sgtm.config.errors import ConfigError
from sgtm.config.schema import Config
from sgtm.estimate.memory import Memory, checkpoint_bytes, memory
from sgtm.estimate.shapes import parameter_sizes
from sgtm.estimate.speed import Duration, Machine, Speed, duration, speed
from sgtm.estimate.traffic import Collective, collectives
from sgtm.estimate.units import GB, amount
from sgtm.words import counted, listed

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class StageEstimate:
    """What one ZeRO stage needs and, by the stated model, how fast it is.

    whole, best  the run in time, with nothing hidden behind the computation and at best
    checkpoint   bytes
    """

    stage: int
    memory: Memory
    moved: list[Collective]
    speed: Speed
    whole: Duration
    best: Duration
    checkpoint: int


def estimate(config: Config, machine: Machine) -> list[StageEstimate]:
    """A row for each stage, with `distributed.offload_optimizer` from 1.

    Raises ValueError where the step, or the ranks themselves, do not divide.
    """
    check_divides(config, machine.ranks)
    rows = []
    for stage in STAGES[1:] if config.distributed.offload_optimizer else STAGES:
        moved = collectives(config, stage, machine.ranks)
        pace = speed(config, machine, moved)
        whole, best = (duration(config, machine, step) for step in (pace.step, pace.best_step))
        held = memory(config, stage, machine.ranks)
        rows.append(StageEstimate(stage, held, moved, pace, whole, best, checkpoint_bytes(config, stage)))
    return rows


def recommended(rows: list[StageEstimate], machine: Machine) -> StageEstimate | None:
    """Of the stages that fit the fastest with nothing hidden, which is the same assumption for all; None: none fits.

    Of equal ones the lower stage, but ZeRO 1 before 0: it sends as much and holds no more.
    """
    fit = [row for row in rows if row.memory.peak <= machine.memory * GB]
    return min(fit, key=lambda row: (row.speed.step, row.stage or 1.5), default=None)


def as_json(config: Config, machine: Machine, rows: list[StageEstimate]) -> str:
    """Bytes, seconds and shares, under the names that the code has."""
    choice = recommended(rows, machine)
    return json.dumps(
        {
            "config": config.name,
            "parameters": sum(parameter_sizes(config).values()),
            "ranks": machine.ranks,
            "accumulation": config.accumulation(machine.ranks),
            "tokens_per_step": config.train.tokens_per_step,
            "steps": config.train.steps,
            "machine": asdict(machine),
            "recommended_zero_stage": None if choice is None else choice.stage,
            "stages": [
                {
                    "zero_stage": row.stage,
                    "peak_bytes": row.memory.peak,
                    "fits": row.memory.peak <= machine.memory * GB,
                    "memory": asdict(row.memory),
                    "sent_bytes_per_rank": sum(c.sent(machine.ranks) for c in row.moved),
                    "collectives": [asdict(c) for c in row.moved],
                    "speed": asdict(row.speed),
                    "whole": asdict(row.whole),
                    "best": asdict(row.best),
                    "checkpoint_bytes": row.checkpoint,
                }
                for row in rows
            ],
        },
        indent=2,
    )


def arithmetic(config: Config, machine: Machine) -> str:
    """Parameters, ranks, and how a step's tokens are divided."""
    train, parameters = config.train, sum(parameter_sizes(config).values())
    micro_batch = config.for_ranks(machine.ranks).micro_batch
    ranks = counted(machine.ranks, "rank")
    return (
        f"{config.name}: {parameters:,} parameters, {train.precision}\n"
        f"{ranks} = {counted(machine.nodes, 'node')} x {machine.gpus}\n"
        f"{train.tokens_per_step:,} tokens per step = {ranks} x {config.accumulation(machine.ranks)} accumulation x "
        f"{counted(micro_batch, 'sequence')} x "
        f"{config.model.context} tokens"
    )


def check_divides(config: Config, ranks: int) -> int:
    """Accumulation of a run on `ranks` ranks. Raises ConfigError that names what would divide."""
    try:
        config.distributed.check_ranks(ranks)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return accumulation(config, ranks)


def accumulation(config: Config, ranks: int) -> int:
    """As `check_divides`, of the step alone."""
    try:
        return config.accumulation(ranks)
    except ValueError as error:
        most = min(config.train.micro_batch or 0, config.sequences_per_step)
        fits = [n for n in range(1, most + 1) if _divides(config, ranks, n)]
        too_large = " divide them" * ((config.train.micro_batch or 0) > config.sequences_per_step)
        advice = f"train.micro_batch {listed(fits, 'or')} would{too_large}" if fits else _other_steps(config, ranks)
        raise ConfigError(f"{error}; {advice}") from None


def _other_steps(config: Config, ranks: int) -> str:
    """Tokens per step and numbers of ranks that divide, with the micro-batch as it is where a step has one of each
    rank, else with 1."""
    sequences, size = config.sequences_per_step, config.train.micro_batch or 1
    blocks = config.data.micro_blocks if config.data.mixing == "micro" else 1
    micro_batch = size if sequences >= size * blocks * ranks else 1
    least = micro_batch * blocks * ranks
    near = [n * least * config.model.context for n in (sequences // least, sequences // least + 1) if n]
    counts = [n for n in range(1, ranks) if _divides(config, n, micro_batch)][-3:]
    changed = "" if micro_batch == size else f"with train.micro_batch {micro_batch} "
    others = f", and so would {listed(counts, 'or')} rank{'' if counts == [1] else 's'}" if counts else ""
    return f"{changed}train.tokens_per_step {listed(near, 'or')} would{others}"


def check_fits(config: Config, ranks: int, limit: float, whose: str) -> None:
    """Raise ValueError where a rank needs more than `limit` bytes, with what would fit.

    whose  what the limit is of, for the message
    """
    config, stage = config.for_ranks(ranks), config.distributed.zero_stage
    needed = memory(config, stage, ranks).peak
    if needed <= limit:
        return
    tried = []
    stages = [s for s in STAGES if s > stage and memory(config, s, ranks).peak <= limit]
    tried += [f"distributed.zero_stage {listed(stages, 'or')}"] if stages else []
    smaller = [n for n in range(1, config.micro_batch) if _divides(config, ranks, n)]
    batches = [n for n in smaller if memory(with_micro_batch(config, n), stage, ranks).peak <= limit]
    tried += [f"train.micro_batch {listed(batches, 'or')}"] if batches else []
    single = _changed(config, "distributed", zero_hpz_partition_size=1)
    if memory(single, stage, ranks).peak <= limit:
        tried.append("distributed.zero_hpz_partition_size 1")
    if memory(_changed(config, "model", activation_checkpointing=True), stage, ranks).peak <= limit:
        tried.append("model.activation_checkpointing true")
    if not tried:
        least = _changed(single, "model", activation_checkpointing=True)
        least = with_micro_batch(least, n := min(smaller, default=config.micro_batch))
        if memory(least, 3, ranks).peak <= limit:
            hpz = " distributed.zero_hpz_partition_size 1," if config.distributed != single.distributed else ""
            together = f"train.micro_batch {n} and model.activation_checkpointing true"
            tried.append(f"distributed.zero_stage 3,{hpz} {together} together")
    advice = f"what fits: {'; or '.join(tried)}" if tried else "no stage and no micro-batch fits: take more ranks"
    raise ValueError(
        f"distributed.zero_stage {stage} with train.micro_batch {config.micro_batch} on "
        f"{counted(ranks, 'rank')} needs about {amount(needed)} on each, more than the {amount(limit)} of {whose}; "
        f"{advice}"
    )


def with_micro_batch(config: Config, micro_batch: int) -> Config:
    return _changed(config, "train", micro_batch=micro_batch)


def _changed(config: Config, section: str, **values: object) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _divides(config: Config, ranks: int, micro_batch: int) -> bool:
    try:
        with_micro_batch(config, micro_batch).accumulation(ranks)
    except ValueError:
        return False
    return True
