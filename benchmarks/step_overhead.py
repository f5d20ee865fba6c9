"""What masking costs: step times against the unmasked step of the same code, and against Hugging Face's GPT-Neo.

    python benchmarks/step_overhead.py [--preset tinystories-18m] [--sequences 4] [--rounds 15] [--json FILE]

One model, one engine: in every round each row takes one full training step (forward, backward, AdamW), in turn, so
that a row is compared with `none` in the same round while the machine's speed drifts. A row's `ratio` is its step time
over that of `none`; for Hugging Face, which runs in processes of its own (hugging_face.py), our unmasked tokens/s over
its. Peak memory is the growth of the process (or of the CUDA allocator) during a step, in turn as well. The report
gives p20/p50/p80 over the rounds, and the project's target beside what was measured.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from environment import percentiles, write_rows
from hugging_face import Peer
from rich.console import Console
from rich.table import Table

from sgtm.config import Config, load_config
from sgtm.data.batch import Batch
from sgtm.distributed.engine import Engine
from sgtm.distributed.process_group import init_distributed
from sgtm.masking.strategy import build_tables
from sgtm.model.transformer import Transformer
from sgtm.train.step import LossTotals, train_step
from sgtm_kernels.dispatch import resolve
from sgtm_kernels.measurement import peak_growth
from sgtm_kernels.plan import Tables

FOREIGN = "Hugging Face eager"
UNLABELED, RETAIN, FORGET = 0, 1, 2
# Of the ratio. A pure forget step with joint parameters free has 91 % of the unmasked matmul work at the 18M shape.
TARGETS = {
    "nothing masked": "<= 1.02",
    "25 % forget sequences": "<= 1.00",
    "pure forget": "<= 0.85",
    "pure forget, joint masked": "<= 0.85",
    "Hugging Face eager, bf16 autocast": ">= 3",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tinystories-18m")
    parser.add_argument("--sequences", type=int, default=4, help="sequences of a step, one micro-batch (default 4)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write one JSON object per row")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = one_micro_batch(args.preset, args.sequences)
    setting = f"{args.preset}, batch {args.sequences} x {config.model.context}, {config.train.precision}"
    rows = [{**row, "setting": setting} for row in measure(config, args.rounds)]
    show(rows)
    if args.json:
        write_rows(args.json, rows)


def one_micro_batch(preset: str, sequences: int) -> Config:
    config = load_config(preset, [])
    tokens = sequences * config.model.context
    return load_config(preset, [f"--train.tokens_per_step={tokens}", f"--train.micro_batch={sequences}"])


def measure(config: Config, rounds: int) -> list[dict]:
    """One result row for each way of taking a step."""
    init_distributed(config)
    torch.manual_seed(0)
    engine = Engine(Transformer(config.model, config.partition, resolve(config.kernels.backend)), config)
    none = build_tables(config.space, "none")
    n = config.sequences_per_step
    quarter = [FORGET] * (n // 4) + [UNLABELED] * (n - n // 4)
    ours = {
        "none": (none, [UNLABELED] * n),
        "nothing masked": (config.tables, [UNLABELED] * n),
        "25 % forget sequences": (config.tables, quarter),
        "pure forget": (config.tables, [FORGET] * n),
        "pure forget, joint masked": (build_tables(config.space, "sgtm", joint="masked"), [FORGET] * n),
        "pure retain": (config.tables, [RETAIN] * n),
    }
    ways = {name: Ours(engine, config, tables, labels) for name, (tables, labels) in ours.items()}
    for precision in ("bf16 autocast", "bf16 weights"):
        ways[f"{FOREIGN}, {precision}"] = Peer(config, precision)
        if not torch.cuda.is_available():
            ways[f"{FOREIGN}, {precision}, freed memory kept"] = Peer(config, precision, "kept")
    for way in ways.values():
        way.step()
    times = {name: [] for name in ways}
    memory = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(way.step())
    for _ in range(min(rounds, 5)):
        for name, way in ways.items():
            memory[name].append(way.peak())
    tokens = config.train.tokens_per_step
    return [
        row(name, np.array(times[name]), memory[name], np.array(times["none"]), memory["none"], tokens) for name in ways
    ]


class Ours:
    """Our own training step on one batch of random tokens with these labels."""

    def __init__(self, engine: Engine, config: Config, tables: Tables, labels: list[int]):
        ids = torch.randint(config.model.vocab_size, (len(labels), config.model.context + 1))
        batch = Batch(
            input_ids=ids[:, :-1].contiguous(),
            targets=ids[:, 1:].contiguous(),
            labels=tuple(labels),
            lengths=(config.model.context,) * len(labels),
            documents=None,
            step_targets=config.train.tokens_per_step,
            step_labels=frozenset(labels),
        )
        totals = LossTotals(len(tables.labels), engine.device)
        self._take = lambda: train_step(engine, [batch], tables, config.optimizer.lr, totals)

    def step(self) -> float:
        """Seconds of one step."""
        wait_for_device()
        began = time.perf_counter()
        self._take()
        wait_for_device()
        return time.perf_counter() - began

    def peak(self) -> float:
        """MiB by which memory grows at most during a step."""
        return peak_growth(self._take)


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def row(name: str, seconds: np.ndarray, memory: list, base: np.ndarray, base_memory: list, tokens: int) -> dict:
    ratios = seconds / base
    return {
        "row": name,
        "seconds": percentiles(seconds),
        "tokens_per_second": round(tokens / float(np.median(seconds)), 1),
        "ratio": percentiles(ratios),
        "ratio_of": "our unmasked tokens/s, to its" if name.startswith(FOREIGN) else "step time, to none",
        "target": TARGETS.get(name),
        "peak_mib": round(float(np.median(memory)), 1),
        "memory_ratio": round(float(np.median(memory) / np.median(base_memory)), 4),
        "rounds": len(seconds),
    }


def show(rows: list[dict]) -> None:
    table = Table("row", "tokens/s", "step p20/p50/p80 (s)", "ratio p20/p50/p80", "target", "peak MiB", "memory ratio")
    for r in rows:
        spread = [" / ".join(f"{r[key][p]:.3f}" for p in ("p20", "p50", "p80")) for key in ("seconds", "ratio")]
        table.add_row(
            r["row"],
            f"{r['tokens_per_second']:,.0f}",
            *spread,
            r["target"] or "",
            f"{r['peak_mib']:.0f}",
            f"{r['memory_ratio']:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
