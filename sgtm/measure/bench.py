"""`sgtm bench`: what masks cost in a training step of one configuration, on this machine.

One model, one engine: in every round each row takes one full training step (forward, backward, AdamW) on random tokens,
in turn, so that a row is compared with `none` in the same round while the machine's speed drifts. Peak memory is the
growth of the process (or of the CUDA allocator) during a step, in turn as well.

Sequences are label-pure and dealt to the micro-batches evenly, as `data.mixing: sequence` does, whatever the config's
mixing is. Pure forget is of the first domain; where sequences are mixed the domains take turns.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sgtm.config import Config
from sgtm.distributed.engine import Engine
from sgtm.distributed.process_group import init_distributed
from sgtm.distributed.self_check import check_kernels
from sgtm.masking.labels import FIRST_FORGET, RETAIN, UNLABELED
from sgtm.masking.strategy import JOINT_PRESETS, build_tables, joint_kinds
from sgtm.measure.cases import NONE, NOTHING, PURE, Case, dealt, random_batches
from sgtm.measure.peer import NAME, peers
from sgtm.measure.rounds import LocalStep, Rounds, TimedStep, take_rounds
from sgtm.measure.rows import CPU_TARGETS, PEER_TARGETS, as_parent, failure, row, table
from sgtm.training.start import dry_run, initial_model
from sgtm.training.step import StepTotals, train_step
from sgtm.words import counted
from sgtm_kernels.dispatch import resolve
from sgtm_kernels.measurement import write_rows
from sgtm_kernels.plan import Tables
from sgtm_kernels.tools.shapes import Shape

ROUNDS = 15
FEW = 5  # rounds; with fewer, percentiles mean little


def bench(
    config: Config, rounds: int = ROUNDS, to: Path | None = None, tune: bool = False, with_peers: bool = False
) -> None:
    """Measure, print a table, and write one JSON object per row to `to`. With several ranks, rank 0 prints and writes.

    tune        before that, time the candidates of the Triton kernels at this config's shape and write this device's
                table (`sgtm_kernels.tools.tune`)
    with_peers  Hugging Face's model of this shape takes its steps in the same rounds, in processes of its own

    Raises ValueError for a config that masks nothing, for fewer than 4 sequences a step and rank, where a step does not
    fit into memory, for peers of several ranks, and for `tune` without a CUDA device, on several ranks, with another
    backend than triton or where SGTM_TUNED names another table; OSError where `to`, or the table, cannot be written.
    """
    check(config)
    if tune:
        _tune(config)
    if to is not None:
        _check_writable(to)
    rank_info = init_distributed(config.distributed, config.kernels)
    config = config.for_ranks(rank_info.world_size)
    if with_peers and rank_info.world_size > 1:
        raise ValueError("--peers compares one process with one process: run it without a launcher")
    cases = label_cases(config, rank_info.world_size)
    if rank_info.rank == 0:
        few = "; so few compare nothing: --rounds 15" if rounds < FEW else ""
        print(f"{setting(config)}: measuring {len(cases)} rows in {counted(rounds, 'round')}{few}", flush=True)
    for warning in check_kernels(config):
        print(warning, file=sys.stderr)
    others = peers(config) if with_peers else {}
    steps: dict[str, TimedStep] = {**engine_steps(config, cases), **others}
    took = take_rounds(steps, rounds, may_fail=others)
    results = [about | {"setting": setting(config)} for about in rows(config, took)]
    for name, peer in others.items():
        if name not in took.failed:
            next(about for about in results if about["row"] == name)["attention"] = peer.attention()
    if rank_info.rank == 0:
        heading = f"{setting(config)}: {counted(rounds, 'round')}; time and memory relative to {NONE}"
        print(f"{heading}\n\n{table(results)}\n")
        print("ratios compare steps of the same round; tokens/s are those of none over the ratio")
        if to is not None:
            write_rows(to, results)


def check(config: Config) -> None:
    """Raises ValueError for a config in which there is no mask to measure."""
    if not config.masking.domains:
        raise ValueError("masking.domains is empty, so nothing is masked; name one: --masking.domains '[forget]'")
    if config.masking.strategy == NONE:
        raise ValueError("masking.strategy none masks nothing; name another: --masking.strategy sgtm")


def rows(config: Config, took: Rounds[str]) -> list[dict[str, Any]]:
    """A result row for each step, relative to `none`. Of the peers, the fastest has a target."""
    tokens = config.train.tokens_per_step
    base = took.sample(NONE, tokens)
    parent = as_parent(row(NONE, base, None), base)
    targets = dict(CPU_TARGETS.get(config.name, {})) if not torch.cuda.is_available() else {}
    foreign = {name: sum(one.wall for one in steps) for name, steps in took.took.items()
               if name.startswith(NAME) and name not in took.failed}  # fmt: skip
    if foreign and config.name in PEER_TARGETS:
        targets[min(foreign, key=foreign.__getitem__)] = PEER_TARGETS[config.name]
    results = []
    for name in took.took:
        if name in took.failed:
            results.append(failure(name, took.failed[name]))
        else:
            results.append(row(name, took.sample(name, tokens), parent if name != NONE else None, targets.get(name)))
    return results


def _check_writable(to: Path) -> None:
    """Raises ValueError or OSError before the measurement; leaves no empty file if that is interrupted."""
    if to.is_dir():
        raise ValueError(f"--json: {to} is a folder, but it takes a file")
    to.parent.mkdir(parents=True, exist_ok=True)
    existed = to.exists()
    to.open("a").close()
    if not existed:
        to.unlink(missing_ok=True)  # another rank may have


def _tune(config: Config) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--tune is for one process: run it without a launcher, once on each kind of device")
    if not torch.cuda.is_available():
        raise ValueError("--tune needs a CUDA device and there is none here; without a table the heuristics hold")
    if (backend := resolve(config.kernels.backend)) != "triton":
        raise ValueError(
            f"--tune tunes the Triton kernels, but kernels.backend is {backend!r} here: --kernels.backend triton"
        )
    if named := os.environ.get("SGTM_TUNED"):
        raise ValueError(f"--tune writes this device's table, but SGTM_TUNED={named!r} is what would be read; unset it")
    from sgtm_kernels.tools.tune import tune

    tune(shapes=[shape_of(config.for_ranks(1))])


def shape_of(config: Config) -> Shape:
    """A masked layer of this config, and its micro-batch."""
    m, partition = config.model, config.partition
    layer = next(layer for i, layer in enumerate(partition.layers) if partition.masked(i))
    return Shape(
        batch=config.micro_batch,
        seq_len=m.context,
        width=m.hidden_size,
        heads=m.heads,
        kv_heads=m.num_kv_heads,
        neurons=m.neurons,
        vocab=m.vocab_size,
        forget_heads=sum(layer.heads[1:]),
        forget_neurons=m.neurons - layer.neuron_bounds[1],
        gated=m.family != "gpt_neo",
    )


def setting(config: Config) -> str:
    t = config.train
    micro = "" if config.sequences_per_step == t.micro_batch else f" in micro-batches of {t.micro_batch}"
    compiled = ", blocks compiled" if t.compile == "blocks" else ""
    return f"{config.name}, batch {config.sequences_per_step} x {config.model.context}{micro}, {t.precision}{compiled}"


def label_cases(config: Config, world_size: int) -> dict[str, Case]:
    """The rows: tables, and the label of each of a rank's sequences in a step.

    Raises ValueError for fewer than 4 sequences, and where the ranks cannot share a step.
    """
    m, space, micro_batches = config.masking, config.space, config.accumulation(world_size)
    n = micro_batches * config.micro_batch
    if n < 4:
        raise ValueError(
            f"train.tokens_per_step {config.train.tokens_per_step} is {counted(n, 'sequence')} of "
            f"{config.model.context} for each rank; a row with a quarter of forget sequences needs 4: "
            f"--train.tokens_per_step {4 * config.model.context * world_size}"
        )
    none, some = build_tables(space, NONE), round(n / 4)
    forget = sorted((FIRST_FORGET + i % len(space.domains) for i in range(some)), reverse=True)
    pure = PURE if len(space.domains) == 1 else f"{PURE} ({space.domains[0]})"

    def case(tables: Tables, labels: list[int], percent: int = 0) -> Case:
        return Case(tables, dealt(labels, micro_batches, config.model.context), percent, ("sequence",))

    cases = {
        NONE: case(none, [UNLABELED] * n),
        NOTHING: case(config.tables, [UNLABELED] * n),
        f"{some / n:.0%} forget sequences".replace("%", " %"): case(
            config.tables, forget + [UNLABELED] * (n - some), round(100 * some / n)
        ),
        pure: case(config.tables, [FIRST_FORGET] * n, 100),
    }
    if set(joint_kinds(m.strategy, m.joint)) < set(JOINT_PRESETS["masked"]):
        joint = build_tables(space, m.strategy, "masked", m.cross_domain, m.overrides)
        cases[f"{pure}, joint masked"] = case(joint, [FIRST_FORGET] * n, 100)
    return cases | {"pure retain": case(config.tables, [RETAIN] * n)}


def engine_steps(config: Config, cases: dict[str, Case]) -> dict[str, LocalStep]:
    """A training step of this config in each case. Needs `init_distributed`.

    Raises ValueError where a step does not fit into memory or blocks cannot be compiled.
    """
    engine = Engine(initial_model(config), config)
    dry_run(engine, config.tables)
    tokens = config.train.tokens_per_step
    steps = {}
    for name, case in cases.items():
        batches = random_batches(case.batches, config.model, torch.device("cpu"), step_targets=tokens)
        totals = StepTotals(len(case.tables.labels), engine.device)
        steps[name] = LocalStep(partial(train_step, engine, batches, case.tables, config.optimizer.lr, totals))
    return steps
