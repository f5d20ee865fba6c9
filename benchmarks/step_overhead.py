"""What masking costs: step times against the unmasked step of the same code, and against Hugging Face's GPT-Neo.

    python benchmarks/step_overhead.py [--preset tinystories-18m] [--sequences 4] [--rounds 15] [--json FILE]

One process, one model, one engine: in every round each row takes one full training step (forward, backward, AdamW), in
turn, so that a row is compared with `none` in the same round while the machine's speed drifts. A row's `ratio` is its
step time over that of `none` (for Hugging Face: its tokens/s relative to ours). Peak memory is the growth of the
process (or of the CUDA allocator) during a step, in turn as well. The report gives p20/p50/p80 over the rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from pathlib import Path

import numpy as np
import torch
from environment import write_rows
from rich.console import Console
from rich.table import Table

from sgtm.config import Config, load_config
from sgtm.data.batch import Batch
from sgtm.distributed.engine import Engine, init_distributed
from sgtm.masking.strategy import build_tables
from sgtm.model.transformer import Transformer
from sgtm.train.step import LossTotals, train_step
from sgtm_kernels.dispatch import resolve

UNLABELED, RETAIN, FORGET = 0, 1, 2


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
    ways = {name: our_step(engine, config, tables, labels) for name, (tables, labels) in ours.items()}
    for variant in ("bf16 autocast", "bf16 weights"):
        ways[f"Hugging Face eager, {variant}"] = hugging_face_step(config, variant)
    for step in ways.values():
        step()
    times = {name: [] for name in ways}
    memory = {name: [] for name in ways}
    for _ in range(rounds):
        for name, step in ways.items():
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    for _ in range(min(rounds, 5)):
        for name, step in ways.items():
            memory[name].append(peak_growth(step))
    tokens = config.train.tokens_per_step
    return [
        row(name, np.array(times[name]), memory[name], np.array(times["none"]), memory["none"], tokens) for name in ways
    ]


def our_step(engine: Engine, config: Config, tables, labels: list[int]):
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
    return lambda: train_step(engine, [batch], tables, config.optimizer.lr, totals)


def hugging_face_step(config: Config, variant: str):
    """Unmasked GPT-Neo in eager attention with torch's fused AdamW, on the same shape."""
    from transformers import GPTNeoForCausalLM

    from sgtm.model.hf_config import hf_config

    m = config.model
    shape = hf_config(m, heads=m.heads, kv_heads=m.num_kv_heads, neurons=m.intermediate_size)
    shape.attention_dropout = shape.embed_dropout = shape.resid_dropout = 0.0
    shape._attn_implementation = "eager"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = GPTNeoForCausalLM(shape).to(device)
    autocast = variant == "bf16 autocast"
    if not autocast:
        model = model.bfloat16()
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True
    )
    ids = torch.randint(m.vocab_size, (config.sequences_per_step, m.context), device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def peak_growth(step) -> float:
    """MiB by which memory grows at most during a step."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back, or the step would grow into it unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark VmHWM (Linux)
    before = status_mib("VmRSS")
    step()
    return status_mib("VmHWM") - before


def status_mib(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def row(name: str, seconds: np.ndarray, memory: list, base: np.ndarray, base_memory: list, tokens: int) -> dict:
    foreign = name.startswith("Hugging Face")
    ratios = base / seconds if foreign else seconds / base
    return {
        "row": name,
        "seconds": percentiles(seconds),
        "tokens_per_second": round(tokens / float(np.median(seconds)), 1),
        "ratio": percentiles(ratios),
        "ratio_of": "tokens/s, to ours unmasked" if foreign else "step time, to none",
        "peak_mib": round(float(np.median(memory)), 1),
        "memory_ratio": round(float(np.median(memory) / np.median(base_memory)), 4),
        "rounds": len(seconds),
    }


def percentiles(values: np.ndarray) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(values, p)), 4) for p in (20, 50, 80)}


def show(rows: list[dict]) -> None:
    table = Table("row", "tokens/s", "step p20/p50/p80 (s)", "ratio p20/p50/p80", "peak MiB", "memory ratio")
    for r in rows:
        spread = [" / ".join(f"{r[key][p]:.3f}" for p in ("p20", "p50", "p80")) for key in ("seconds", "ratio")]
        table.add_row(
            r["row"], f"{r['tokens_per_second']:,.0f}", *spread, f"{r['peak_mib']:.0f}", f"{r['memory_ratio']:.3f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
