"""Host time of a training step: the CPU time that Python and PyTorch need to issue a layer, forward and backward.

    python benchmarks/host.py [--backend triton,torch] [--rounds 31] [--json FILE]

Models of tiny tensors, so that the work itself is next to nothing, against the plain eager model of
sgtm/measure/plain.py in the same rounds. Triton's kernels are replaced by launches that do nothing (their own cost, 10
to 20 us each, is Triton's). Times are CPU time of the process, so that other processes on the machine matter little; a
layer's time is the difference between a deep and a shallow model over the difference in depth. No GPU is used."""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
from arguments import FAST, one_of, positive
from environment import percentiles, write_rows

from sgtm.masking.labels import UNLABELED
from sgtm.masking.shape import ModelShape
from sgtm.masking.strategy import build_tables
from sgtm.measure.models import LABELS, Setting
from sgtm.measure.plain import Plain
from sgtm.model.transformer import Transformer
from sgtm_kernels.plan import LabelRun, MaskPlan

TARGET = 1.2  # times the plain eager model's host time per layer
SHALLOW, DEEP, STEPS = 2, 10, 3  # layers; steps of a turn, of which the fastest counts
SEQUENCES, SEQ_LEN = 2, 16
FORGET = len(LABELS.labels) - 1
SHAPE = {"layers": DEEP, "hidden_size": 64, "heads": 8, "intermediate_size": 64, "vocab_size": 64, "context": SEQ_LEN}
FAMILIES = {
    "gpt_neo": Setting(ModelShape(**SHAPE), 1, 16, "masked", SEQUENCES, 1),
    "llama": Setting(ModelShape(**SHAPE, family="llama", kv_heads=2), 4, 16, "masked", SEQUENCES, 1),
}
MASKS = ("unmasked", "masked")  # masked: a sequence of forget tokens and one without a label, joint parameters masked

Step = Callable[[], float]  # CPU time in seconds


def without_kernels() -> None:
    """Triton's launches do nothing from here on in this process."""
    from triton.runtime.interpreter import InterpretedFunction

    def launch(*_, **__):
        pass

    InterpretedFunction.__getitem__ = lambda self, grid: launch


def timed(step: Callable[[], torch.Tensor], model: torch.nn.Module) -> float:
    """CPU seconds of forward and backward; the fastest of STEPS."""
    seconds = []
    for _ in range(STEPS):
        start = time.process_time()
        step().backward()
        seconds.append(time.process_time() - start)
        model.zero_grad(set_to_none=True)
    return min(seconds)


def plain(setting: Setting, ids: torch.Tensor) -> Step:
    model = Plain(setting.model)
    return lambda: timed(lambda: model(ids, ids, 1 / ids.numel()), model)


def ours(setting: Setting, ids: torch.Tensor, backend: str, masks: str) -> Step:
    """With a plan of its own for every step, as in training."""
    model = Transformer(setting.model, setting.partition, backend)
    tables = build_tables(LABELS, "none", "free")
    runs = (LabelRun(UNLABELED, 0, ids.numel()),)
    if masks == "masked":
        tables = build_tables(LABELS, "sgtm", "masked")
        runs = LabelRun(FORGET, 0, SEQ_LEN), LabelRun(UNLABELED, SEQ_LEN, ids.numel())
    return lambda: timed(lambda: model(ids, ids, MaskPlan(tables, runs, *ids.shape), 1 / ids.numel())[0], model)


def layer_times(steps: dict[str, dict[int, Step]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of a layer, of every variant in every round; steps: of each variant by depth."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name in steps:
        for depth in (SHALLOW, DEEP):
            steps[name][depth]()
    for _ in range(rounds):
        for name, depths in steps.items():
            gc.collect()
            seconds[name].append((depths[DEEP]() - depths[SHALLOW]()) / (DEEP - SHALLOW))
    return seconds


def measure(family: str, backends: list[str], rounds: int) -> list[dict]:
    """A row for the plain model, then one for each backend and mask with its ratio to it, paired by round."""
    setting, ids = FAMILIES[family], torch.randint(64, (SEQUENCES, SEQ_LEN))
    by_depth = {depth: replace(setting, model=replace(setting.model, layers=depth)) for depth in (SHALLOW, DEEP)}
    steps = {"plain eager": {depth: plain(one, ids) for depth, one in by_depth.items()}}
    for backend in backends:
        for masks in MASKS:
            steps[f"{backend} {masks}"] = {d: ours(one, ids, backend, masks) for d, one in by_depth.items()}
    times = layer_times(steps, rounds)
    rows = []
    for name, seconds in times.items():
        row = {"row": f"host time per layer, {family}, {name}", "unit": "us", **percentiles([s * 1e6 for s in seconds])}
        if name != "plain eager":
            ratio = statistics.median(s / base for s, base in zip(seconds, times["plain eager"], strict=True))
            row |= {"ratio": round(ratio, 3), "target": f"<= {TARGET}", "missed": ratio > TARGET}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", type=one_of(FAST), default=list(FAST), help=f"of {','.join(FAST)} (default: both)")
    parser.add_argument("--family", type=one_of(FAMILIES), default=list(FAMILIES), help="of gpt_neo,llama")
    parser.add_argument("--rounds", type=positive, default=31)
    parser.add_argument("--json", type=Path, help="write one JSON object per row")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what the kernels leave unwritten can be anything, and denormals are slow
    without_kernels()
    rows = [row for family in args.family for row in measure(family, args.backend, args.rounds)]
    for row in rows:
        mark = "  MISSED" if row.get("missed") else ""
        ratio = f"  {row['ratio']:.2f} of plain eager, target {row['target']}{mark}" if "ratio" in row else ""
        print(f"{row['row']:52} {row['p50']:7.1f} us{ratio}")
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()
