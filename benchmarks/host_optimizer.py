"""Host time of an optimizer step: everything but the kernels, whose launches are replaced by no-ops.

    python benchmarks/host_optimizer.py [--shape 254m] [--rounds 50]

The segments are those of the preset's layers, in one flat partition, as under ZeRO 1 and 2, and in a tensor for each
parameter, as under ZeRO 0 in fp32; gradients are other tensors than in the step before. Widths are small, since no
kernel runs. Median CPU time of this process, for an unmasked and a pure forget step. Target: under 0.5 ms at 254m.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from itertools import product
from statistics import median

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: no device is needed

import torch
from arguments import FAST, positive
from environment import RESULTS
from triton.runtime.jit import KernelInterface

sys.path.insert(0, str(RESULTS.parents[1]))

from sgtm.distributed.optim import SegmentedAdamW
from sgtm.distributed.segments import Fragment, segment_tables
from sgtm.masking.labels import UNLABELED
from sgtm.masking.strategy import build_tables
from sgtm.measure.bare import AdamW
from sgtm.measure.models import LABELS, SETTINGS, Setting
from sgtm.model.rows import live_keys
from sgtm.model.transformer import Transformer

TARGET = 0.5  # ms at 254m
LAYOUTS = ("flat", "by parameter")


def optimizer_of(setting: Setting, backend: str, layout: str) -> SegmentedAdamW:
    """The optimizer of a backend over the shape's segments at a small width."""
    shape = replace(setting.model, hidden_size=8 * setting.model.heads, head_dim=8, vocab_size=64, context=16)
    model = Transformer(shape, setting.partition, backend)
    parameters, rows = dict(model.named_parameters()), model.parameter_rows()
    numels = {name: parameter.numel() for name, parameter in parameters.items()}
    flat = torch.nn.Parameter(torch.zeros(sum(numels.values())))
    offset, pieces = 0, []
    for name, numel in numels.items():
        location = (flat, offset) if layout == "flat" else (parameters[name], 0)
        pieces.append(Fragment(*location, name, 0, numel))
        offset += numel
    optimizer = SegmentedAdamW([flat] if layout == "flat" else parameters.values(), AdamW(), backend)
    optimizer.set_segments(segment_tables(pieces, numels, rows), {k for row in rows.values() for k in row.keys})
    return optimizer


def milliseconds(optimizer: SegmentedAdamW, live: frozenset[str], rounds: int) -> float:
    tensors, times = list(optimizer.tables), []
    turns = [[torch.zeros_like(tensor) for tensor in tensors] for _ in range(2)]
    for turn in range(rounds + 5):
        for tensor, grad in zip(tensors, turns[turn % 2], strict=True):
            tensor.grad = grad
        began = time.process_time()
        optimizer.begin_step(live, 1e-4)
        optimizer.step()
        times.append(time.process_time() - began)
    return 1e3 * median(times[5:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SETTINGS, default="254m")
    parser.add_argument("--rounds", type=positive, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    KernelInterface.__getitem__ = lambda kernel, grid: lambda *args, **kwargs: None
    torch._fused_adamw_ = lambda *args, **kwargs: None
    setting = SETTINGS[options.shape]()
    tables = build_tables(LABELS, "sgtm", setting.joint)
    for backend, layout in product(FAST, LAYOUTS):
        optimizer = optimizer_of(setting, backend, layout)
        segments = sum(map(len, optimizer.tables.values()))
        for name, label in (("nothing masked", UNLABELED), ("pure forget", len(tables.labels) - 1)):
            duration = milliseconds(optimizer, live_keys(tables, {label}), options.rounds)
            missed = "  MISSED" if options.shape == "254m" and duration > TARGET else ""
            print(f"{options.shape}, {backend}, {layout}, {segments} segments, {name}: {duration:.3f} ms{missed}")


if __name__ == "__main__":
    main()
