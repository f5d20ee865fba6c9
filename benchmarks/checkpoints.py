"""What a checkpoint costs in training time: written while training continues, and written while it waits.

    python benchmarks/checkpoints.py [--preset tinystories-18m] [--sequences 4] [--rounds 24] [--json FILE]

In every round the same number of training steps is taken three times, in changing order: without a checkpoint, with one
begun after the first step (`train.async_checkpoint`), and with one that is waited for. Time lost is the difference of
times in a round, so it holds what the writing thread takes from training on its cores. Its share of training time at an
interval is that loss over the time of so many steps.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

import torch
from environment import environment, percentiles, write_rows

from sgtm.config import Config, load_config
from sgtm.data.random_data import random_batch
from sgtm.distributed.engine import Engine
from sgtm.distributed.process_group import init_distributed
from sgtm.masking.labels import UNLABELED
from sgtm.measure.bench import setting
from sgtm.model.transformer import Transformer
from sgtm.run.saving import CheckpointWriter, Saved
from sgtm.training.step import StepTotals, train_step
from sgtm_kernels.dispatch import resolve

INTERVALS = (10, 50, 100, 500, 1000)
STEPS = 4  # of a turn; the background writer is done before
TARGET = 0.01  # share of training time, asynchronous


class Trainer:
    """One engine that takes turns of STEPS training steps, each from where the last one ended."""

    def __init__(self, config: Config, run: Path):
        torch.manual_seed(0)
        self.engine = Engine(Transformer(config.model, config.partition, resolve(config.kernels.backend)), config)
        self.batch = random_batch(config, (UNLABELED,) * config.train.micro_batch)
        self.totals = StepTotals(len(config.space.labels), self.engine.device)
        self.config, self.run, self.done = config, run, 0

    def turn(self, kind: str) -> tuple[float, Saved | None]:
        """Seconds of a turn, and its checkpoint; kind: `none`, `asynchronous` or `waited for`."""
        waits = self.config.train.model_copy(update={"async_checkpoint": kind == "asynchronous", "keep_last": 1})
        writer = CheckpointWriter(self.engine, self.run, self.config.model_copy(update={"train": waits}))
        checkpoints: list[Saved] = []
        began = time.perf_counter()
        for step in range(STEPS):
            train_step(self.engine, [self.batch], self.config.tables, 1e-4, self.totals)
            self.done += 1
            if step == 0 and kind != "none":
                checkpoints += writer.start(self.done)
            elif saved := writer.poll():
                checkpoints.append(saved)
        if last := writer.finish():
            checkpoints.append(last)
        seconds = time.perf_counter() - began
        writer.close()
        return seconds, checkpoints[0] if checkpoints else None


def measure(config: Config, rounds: int, folder: Path) -> list[dict]:
    """One row for each kind of write."""
    trainer = Trainer(config, folder)
    kinds = ["none", "asynchronous", "waited for"]
    for kind in kinds:
        trainer.turn(kind)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    saved: dict[str, list[Saved]] = {kind: [] for kind in kinds[1:]}
    order = random.Random(0)
    for _ in range(rounds):
        order.shuffle(kinds)
        for kind in kinds:
            took, checkpoint = trainer.turn(kind)
            seconds[kind].append(took)
            if checkpoint:
                saved[kind].append(checkpoint)
    step = percentiles([took / STEPS for took in seconds["none"]])
    rows = []
    for kind, checkpoints in saved.items():
        lost = percentiles([took - base for took, base in zip(seconds[kind], seconds["none"], strict=True)])
        rows.append(
            {
                "checkpoint": kind,
                "lost": lost,
                "paused": percentiles([one.paused for one in checkpoints]),
                "written": percentiles([one.seconds for one in checkpoints]),
                "mib": round(checkpoints[0].bytes / 2**20, 1),
                "step": step,
                "share": {interval: round(lost["p50"] / (interval * step["p50"]), 5) for interval in INTERVALS},
                "rounds": rounds,
                **environment(),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tinystories-18m")
    parser.add_argument("--sequences", type=int, default=4, help="sequences of a step, one micro-batch (default 4)")
    parser.add_argument("--rounds", type=int, default=24, help="(default 24)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write one JSON object per row")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokens = args.sequences * load_config(args.preset, []).model.context
    overrides = [f"--train.tokens_per_step={tokens}", f"--train.micro_batch={args.sequences}"]
    config = load_config(args.preset, overrides)
    init_distributed(config.distributed, config.kernels)
    with tempfile.TemporaryDirectory(dir=".") as folder:  # on the disk of the results, not in memory
        rows = measure(config, args.rounds, Path(folder))
    for row in rows:
        row["setting"] = setting(config)
        shares = ", ".join(f"{interval}: {share:.2%}" for interval, share in row["share"].items())
        print(
            f"{row['checkpoint']}: {row['lost']['p50']:.3f} s lost of {row['step']['p50']:.3f} s steps; paused "
            f"{row['paused']['p50']:.3f} s, in place after {row['written']['p50']:.2f} s; share by interval {shares}"
        )
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()
