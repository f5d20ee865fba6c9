"""The plan of a run: what each ZeRO stage would need, how fast it would be, and which one to take."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from sgtm.config.schema import Config
from sgtm.estimate.fit import STAGES, check_divides
from sgtm.estimate.memory import Memory, checkpoint_bytes, memory
from sgtm.estimate.shapes import parameter_sizes
from sgtm.estimate.speed import Duration, Machine, Speed, duration, speed
from sgtm.estimate.traffic import Collective, collectives
from sgtm.estimate.units import GB, counted


@dataclass(frozen=True)
class Row:
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


def estimate(config: Config, machine: Machine) -> list[Row]:
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
        rows.append(Row(stage, held, moved, pace, whole, best, checkpoint_bytes(config, stage)))
    return rows


def recommended(rows: list[Row], machine: Machine) -> Row | None:
    """Of the stages that fit the fastest with nothing hidden, which is the same assumption for all; None: none fits.

    Of equal ones the lower stage, but ZeRO 1 before 0: it sends as much and holds no more.
    """
    fit = [row for row in rows if row.memory.peak <= machine.memory * GB]
    return min(fit, key=lambda row: (row.speed.step, row.stage or 1.5), default=None)


def as_json(config: Config, machine: Machine, rows: list[Row]) -> str:
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
