"""The profiled steps, and their tables: model, engine and training step are those of `sgtm train`, after a warm-up."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, schedule

from sgtm.config import Config
from sgtm.data.batch import Batch
from sgtm.data.loader import Loader
from sgtm.data.open import open_corpus
from sgtm.data.random_data import RandomCorpus
from sgtm.data.store import Corpus
from sgtm.distributed.env import device_type
from sgtm.distributed.on_ranks import together
from sgtm.distributed.process_group import init_distributed
from sgtm.distributed.self_check import check_kernels
from sgtm.files import write_atomically
from sgtm.measure.nsight import find_kernel, function_name, nsight_command, triton_kernels
from sgtm.measure.ranges import MODULES, PHASES, RangedEngine, name_modules
from sgtm.measure.rounds import wait_for_device
from sgtm.measure.trace import OTHER, summarize
from sgtm.training.start import dry_run, initial_model
from sgtm.training.step import StepTotals, learning_rate, train_step
from sgtm.words import counted

WARM_UP = 3
"""Steps before those that are profiled: caches fill, Triton compiles."""
TOP = 15
"""Kernels that are listed; the rest are one row."""


def run_profile(
    config: Config, *, steps: int, out: Path | None, kernel: str | None, command: list[str], trace: bool = True
) -> None:
    """Profile `steps` training steps, print tables, and write `trace.json` and `summary.json` into `out`.

    out      folder, made if missing; None: `<runs>/<name>-profile`
    kernel   print the command of Nsight Compute for it
    command  arguments of `sgtm profile` that make this config: source and overrides
    trace    False: take the steps without a profiler, as under Nsight Compute, and write nothing

    With several ranks, rank 0 profiles itself. Raises ValueError for an unknown kernel, data that do not fit the
    config and steps that do not fit into memory.
    """
    out = out or Path(config.runs) / f"{config.name}-profile"
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file, but it takes a folder")
    rank_info = init_distributed(config.distributed, config.kernels)
    on_gpu = device_type() == "cuda"
    if kernel and not on_gpu:
        find_kernel(kernel, ())  # an op of the CPU is no kernel; refused before the steps
    if rank_info.rank == 0 and trace:
        out.mkdir(parents=True, exist_ok=True)
    config = config.for_ranks(rank_info.world_size)
    corpus = together(lambda: corpus_of(config))
    batches = first_steps(corpus, config, rank_info.rank, rank_info.world_size, WARM_UP + steps)
    for warning in check_kernels(config):
        print(warning, file=sys.stderr)
    model = initial_model(config)
    name_modules(model)
    engine = RangedEngine(model, config)
    dry_run(engine, config.tables)
    totals = StepTotals(len(config.space.labels), engine.device)

    def take(step: int) -> None:
        lr = learning_rate(step, config.optimizer, config.train.steps)
        train_step(engine, batches[step], config.tables, lr, totals)

    file = out / "trace.json" if trace and rank_info.rank == 0 else None
    with _profiler(file, steps, on_gpu) as next_step:
        for step in range(WARM_UP):
            take(step)
            next_step()
        wait_for_device()
        began = time.perf_counter()
        for step in range(WARM_UP, WARM_UP + steps):
            take(step)
            if step < WARM_UP + steps - 1:
                next_step()
        wait_for_device()
        seconds = time.perf_counter() - began
        next_step()
    if rank_info.rank == 0 and not trace:
        print(f"{config.name}: {counted(steps, 'step')} of {seconds / steps * 1e3:,.1f} ms; no trace was written")
    if file is None:
        return
    summary = summarize(json.loads(file.read_text())["traceEvents"], steps, seconds, on_gpu)
    summary = {"name": config.name, "data": str(corpus.path), "backend": model.backend, **summary}
    write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    print_profile(summary, out)
    if kernel:
        seen = {row["name"]: row["calls_per_step"] for row in summary["kernels"]} if on_gpu else {}
        name = find_kernel(kernel, seen)
        per_step = sum(calls for kernel_name, calls in seen.items() if function_name(kernel_name) == name)
        again, note = [*command, "--steps", "1", "--no-trace"], ""
        if not per_step and name in triton_kernels() and model.backend != "triton":
            again += ["--kernels.backend", "triton"]
            note = f", with --kernels.backend triton, as {model.backend} does not launch it; of its first launch"
            if os.environ.get("SGTM_KERNELS"):
                note += "; unset SGTM_KERNELS"
        elif not per_step:
            note = f", which kernel backend {model.backend} did not launch here"
        print(f"Nsight Compute of {name}{note}:")
        print(nsight_command(name, again, int(WARM_UP * per_step), str(out / name)))


def corpus_of(config: Config) -> Corpus:
    """The config's corpus where it has been prepared, else random tokens.

    Raises ValueError where it is there and damaged or unfinished.
    """
    if config.data.path != "synthetic":
        return open_corpus(config, "sizes") if Path(config.data.path).exists() else RandomCorpus(config)
    try:
        return open_corpus(config, "sizes", write=False)
    except ValueError:  # not written yet, or another edition: training would write it
        return RandomCorpus(config)


def first_steps(corpus: Corpus, config: Config, rank: int, world_size: int, steps: int) -> list[list[Batch]]:
    """This rank's micro-batches of the first steps, read beforehand.

    Raises ValueError where corpus and config do not fit.
    """
    if isinstance(corpus, RandomCorpus):  # it has none of the categories that `data.upsample` names
        config = config.model_copy(update={"data": config.data.model_copy(update={"upsample": {}})})
    loader = Loader(corpus, config, rank, world_size)
    return [loader.step(step) for step in range(steps)]


@contextmanager
def _profiler(file: Path | None, steps: int, on_gpu: bool):
    """Yields what ends a step; the trace of the steps after the warm-up is written to `file`. None: nothing is."""
    if file is None:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(
        activities=activities,
        schedule=schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(file)),
    ) as profiler:
        yield profiler.step


def print_profile(summary: dict, out: Path, console: Console | None = None) -> None:
    """Print a `summary.json`: time by range, the kernels that take longest, and where the files are."""
    console = console or Console()
    busy = summary["kernel_ms_per_step"] / summary["ms_per_step"]
    about = (
        f"{summary['name']}: {counted(summary['steps'], 'step')} of {summary['ms_per_step']:,.1f} ms under the "
        f"profiler, which slows it; {summary['kernel']} {summary['kernel_ms_per_step']:,.1f} ms ({busy:.0%}); kernels "
        f"{summary['backend']}; data: {summary['data']}"
    )
    console.print(about, highlight=False)
    console.print(_ranges(summary["ranges"]))
    console.print(_kernels(summary["kernels"], console.width))
    console.print(f"trace: {out / 'trace.json'} (ui.perfetto.dev, chrome://tracing)", highlight=False, soft_wrap=True)
    console.print(f"all kernels: {out / 'summary.json'}", highlight=False, soft_wrap=True)


def _ranges(rows: list[dict]) -> Table:
    """Milliseconds per step, a row for each module and a column for each phase."""
    cells = {(row["module"], row["phase"]): row for row in rows}
    columns = [*PHASES, OTHER]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("ms per step", no_wrap=True)
    for header in (*columns, "total", "share"):
        table.add_column(header, justify="right", no_wrap=True)
    for module in (*MODULES, OTHER):
        table.add_row(module, *_sums([[cells.get((module, phase))] for phase in columns]))
    table.add_section()
    table.add_row("total", *_sums([[row for row in rows if row["phase"] == phase] for phase in columns]))
    return table


def _sums(parts: list[list[dict | None]]) -> list[str]:
    """Time of each part, of all, and their share; a part without time is left empty."""
    rows_of_parts = [[row for row in part if row] for part in parts]
    times = [sum(row["ms_per_step"] for row in part) for part in rows_of_parts]
    share = sum(row["share"] for part in rows_of_parts for row in part)
    return [*(f"{ms:,.2f}" if ms else "" for ms in times), f"{sum(times):,.2f}", f"{share:.1%}"]


def _kernels(rows: list[dict], width: int) -> Table:
    numbers = ("calls per step", "ms per step", "share")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    room = width - sum(len(header) + 2 for header in numbers) - 6
    table.add_column("kernel", no_wrap=True, overflow="ellipsis", max_width=max(room, 10))
    for header in numbers:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows[:TOP]:
        table.add_row(row["name"], f"{row['calls_per_step']:,.4g}", f"{row['ms_per_step']:,.3f}", f"{row['share']:.1%}")
    if rows[TOP:]:
        calls, ms, share = (sum(row[key] for row in rows[TOP:]) for key in ("calls_per_step", "ms_per_step", "share"))
        table.add_section()
        table.add_row(counted(len(rows) - TOP, "other"), f"{calls:,.4g}", f"{ms:,.3f}", f"{share:.1%}")
    return table
