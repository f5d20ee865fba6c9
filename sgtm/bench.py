"""`sgtm bench`: what masks cost in a training step of one configuration, on this machine.

One model, one engine: in every round each row takes one full training step (forward, backward, AdamW) on random tokens,
in turn, so that a row is compared with `none` in the same round while the machine's speed drifts. A row's `ratio` is
its step time over that of `none`. Peak memory is the growth of the process (or of the CUDA allocator) during a step, in
turn as well.

Sequences are label-pure and dealt to the micro-batches evenly, as `data.mixing: sequence` does, whatever the config's
mixing is. Pure forget is of the first domain; where sequences are mixed the domains take turns.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sgtm.config import Config
from sgtm.data.batch import Batch
from sgtm.distributed.engine import Engine
from sgtm.distributed.process_group import init_distributed
from sgtm.masking.labels import FIRST_FORGET, RETAIN, UNLABELED
from sgtm.masking.strategy import JOINT, build_tables
from sgtm.model.transformer import Transformer
from sgtm.train.dry_run import dry_run
from sgtm.train.step import StepTotals, train_step
from sgtm_kernels.dispatch import resolve
from sgtm_kernels.measurement import peak_growth, percentiles, write_rows
from sgtm_kernels.plan import Tables
from sgtm_kernels.shapes import Shape

BASE = "none"
MEMORY_ROUNDS = 5
ROUNDS = 15
FEW = 5  # rounds; below, the percentiles are of next to nothing


class Way(Protocol):
    """One way of taking a training step."""

    def step(self) -> float:
        """Seconds of one step."""

    def peak(self) -> float:
        """MiB by which memory grows at most during a step."""


def bench(config: Config, rounds: int = ROUNDS, to: Path | None = None, tune: bool = False) -> None:
    """Measure, print a table, and write one JSON object per row to `to`. With several ranks, rank 0 prints and writes.

    tune  before that, time the candidates of the Triton kernels at this config's shape and write this device's table
          (`sgtm_kernels.tune`)

    Raises ValueError for a config that masks nothing, for fewer than 4 sequences a step and rank, where a step does not
    fit into memory, and for `tune` without a CUDA device, on several ranks, with another backend than triton or where
    SGTM_TUNED names another table; OSError where `to`, or the table, cannot be written.
    """
    check(config)
    if tune:
        _tune(config)
    if to is not None:
        _check_writable(to)
    launch = init_distributed(config)
    masks = masks_of(config, launch.world_size)
    if launch.rank == 0:
        few = "; so few compare nothing: --rounds 15" if rounds < FEW else ""
        print(f"{setting(config)}: measuring {len(masks)} rows in {_rounds(rounds)}{few}", flush=True)
    rows = [row | {"setting": setting(config)} for row in measure(masked_steps(config), config, rounds)]
    if launch.rank == 0:
        print_rows(rows)
        if to is not None:
            write_rows(to, rows)


def check(config: Config) -> None:
    """Raises ValueError for a config in which there is no mask to measure."""
    if not config.masking.domains:
        raise ValueError("masking.domains is empty, so nothing is masked; name one: --masking.domains '[forget]'")
    if config.masking.strategy == BASE:
        raise ValueError("masking.strategy none masks nothing; name another: --masking.strategy sgtm")


def _check_writable(to: Path) -> None:
    """A mistake shows before the measurement, which leaves no empty file where it is broken off."""
    to.parent.mkdir(parents=True, exist_ok=True)
    there = to.exists()
    to.open("a").close()
    if not there:
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
    from sgtm_kernels.tune import tune

    tune(shapes=[shape_of(config)])


def shape_of(config: Config) -> Shape:
    """A masked layer of this config, and its micro-batch."""
    m, partition = config.model, config.partition
    layer = next(layer for i, layer in enumerate(partition.layers) if partition.masked(i))
    return Shape(
        batch=config.train.micro_batch,
        seq_len=m.context,
        width=m.hidden_size,
        heads=m.heads,
        kv_heads=m.num_kv_heads,
        neurons=m.intermediate_size,
        vocab=m.vocab_size,
        forget_heads=sum(layer.heads[1:]),
        forget_neurons=m.intermediate_size - layer.neuron_bounds[1],
        gated=m.family == "llama",
    )


def setting(config: Config) -> str:
    t = config.train
    micro = "" if config.sequences_per_step == t.micro_batch else f" in micro-batches of {t.micro_batch}"
    return f"{config.name}, batch {config.sequences_per_step} x {config.model.context}{micro}, {t.precision}"


def masks_of(config: Config, world_size: int) -> dict[str, tuple[Tables, list[int]]]:
    """The rows: tables, and the label of each of a rank's sequences in a step.

    Raises ValueError for fewer than 4 sequences, and where the ranks cannot share a step.
    """
    m, space, n = config.masking, config.space, config.accumulation(world_size) * config.train.micro_batch
    if n < 4:
        raise ValueError(
            f"train.tokens_per_step {config.train.tokens_per_step} is {n} sequences of {config.model.context} for each "
            f"rank; a row with a quarter of forget sequences needs 4: --train.tokens_per_step "
            f"{4 * config.model.context * world_size}"
        )
    none, some = build_tables(space, BASE), round(n / 4)
    forget = sorted((FIRST_FORGET + i % len(space.domains) for i in range(some)), reverse=True)
    pure = "pure forget" if len(space.domains) == 1 else f"pure forget ({space.domains[0]})"
    rows = {
        BASE: (none, [UNLABELED] * n),
        "nothing masked": (config.tables, [UNLABELED] * n),
        f"{some / n:.0%} forget sequences".replace("%", " %"): (config.tables, forget + [UNLABELED] * (n - some)),
        pure: (config.tables, [FIRST_FORGET] * n),
    }
    if m.strategy in JOINT:
        joint = build_tables(space, m.strategy, "masked", m.cross_domain, m.overrides)
        rows[f"{pure}, joint masked"] = joint, [FIRST_FORGET] * n
    rows["pure retain"] = config.tables, [RETAIN] * n
    return rows


def masked_steps(config: Config) -> dict[str, Way]:
    """A training step of this config under each mask. Needs `init_distributed`.

    Raises ValueError for fewer than 4 sequences a rank, and where a step does not fit into memory.
    """
    masks = masks_of(config, dist.get_world_size())
    torch.manual_seed(config.train.seed)
    engine = Engine(Transformer(config.model, config.partition, resolve(config.kernels.backend)), config)
    dry_run(engine, config.tables)
    return {name: MaskedStep(engine, tables, labels) for name, (tables, labels) in masks.items()}


class MaskedStep:
    """A training step on random tokens, in sequences with these applied labels."""

    def __init__(self, engine: Engine, tables: Tables, labels: list[int]):
        self.engine, self.tables, self.labels = engine, tables, labels
        hands = engine.accumulation
        self.batches = [self._batch(labels[hand::hands]) for hand in range(hands)]
        self.totals = StepTotals(len(tables.labels), engine.device)

    def _batch(self, labels: list[int]) -> Batch:
        config = self.engine.config
        context = config.model.context
        ids = torch.randint(config.model.vocab_size, (len(labels), context + 1))
        return Batch(
            input_ids=ids[:, :-1].contiguous(),
            targets=ids[:, 1:].contiguous(),
            labels=tuple(labels),
            lengths=(context,) * len(labels),
            documents=None,
            step_targets=config.train.tokens_per_step,
            step_labels=frozenset(self.labels),
        )

    def _take(self) -> None:
        train_step(self.engine, self.batches, self.tables, self.engine.config.optimizer.lr, self.totals)

    def step(self) -> float:
        wait_for_device()
        began = time.perf_counter()
        self._take()
        wait_for_device()
        return time.perf_counter() - began

    def peak(self) -> float:
        return peak_growth(self._take)


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(ways: dict[str, Way], config: Config, rounds: int) -> list[dict]:
    """One result row for each way, after a first step of each; one of them is called `none`."""
    for way in ways.values():
        way.step()
    times = {name: [] for name in ways}
    memory = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(way.step())
    for _ in range(min(rounds, MEMORY_ROUNDS)):
        for name, way in ways.items():
            memory[name].append(way.peak())
    tokens = config.train.tokens_per_step
    return [
        _row(name, np.array(times[name]), memory[name], np.array(times[BASE]), memory[BASE], tokens) for name in ways
    ]


def _row(name: str, seconds: np.ndarray, memory: list, base: np.ndarray, base_memory: list, tokens: int) -> dict:
    unmasked = float(np.median(base_memory))
    return {
        "row": name,
        "seconds": percentiles(seconds),
        "tokens_per_second": round(tokens / float(np.median(seconds)), 1),
        "ratio": percentiles(seconds / base),
        "ratio_of": f"step time, to {BASE}",
        "target": None,
        "peak_mib": round(float(np.median(memory)), 1),
        "memory_ratio": round(float(np.median(memory)) / unmasked, 4) if unmasked else None,
        "rounds": len(seconds),
    }


def print_rows(rows: list[dict], console: Console | None = None) -> None:
    """Rows of `measure`, with a `setting`, as a table; of the ratio of times p20, p50 and p80 over the rounds."""
    console = console or Console()
    about = f"{rows[0]['setting']}: {_rounds(rows[0]['rounds'])}; time and memory relative to {BASE}"
    console.print(about, highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("row")
    for header in ("tokens/s", "time p20/p50/p80", "peak MiB", "memory"):
        table.add_column(header, justify="right", no_wrap=True)
    targets = any(r["target"] for r in rows)
    if targets:
        table.add_column("target", no_wrap=True)
    for r in rows:
        ratio = "/".join(f"{r['ratio'][p]:.3f}" for p in ("p20", "p50", "p80"))
        memory = "" if r["memory_ratio"] is None else f"{r['memory_ratio']:.3f}"
        cells = [r["row"], f"{r['tokens_per_second']:,.0f}", ratio, f"{r['peak_mib']:,.1f}", memory]
        table.add_row(*cells, *([r["target"] or ""] if targets else []))
    console.print(table)
    console.print("ratios compare steps of the same round; tokens/s is of the median step", highlight=False)


def _rounds(count: int) -> str:
    return f"{count} round{'s' * (count != 1)}"
