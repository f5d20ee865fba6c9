"""`sgtm estimate`: the plan of a run as tables, one row for each ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sgtm.config.schema import Config
from sgtm.estimate.speed import PEAK, Machine
from sgtm.estimate.stages import StageEstimate, arithmetic, check_fits, recommended
from sgtm.estimate.units import GB, amount, unit
from sgtm.estimate.zero3 import Limits, gathered_times
from sgtm.words import counted, listed

MEMORY = {
    "weights": ("weights", "hpZ weights", "gathered weights"),
    "gradients": ("gradients",),
    "optimizer": ("fp32 weights", "moments"),
    "activations": ("activations",),
    "buffers": ("bucket", "buckets", "working"),
}

SAME = (
    "ZeRO 0 and 1 are the same in bf16: both run as DeepSpeed's bf16 optimizer, which shards the fp32 weights and the "
    "moments over the ranks; its own ZeRO 0 would sum gradients in bf16."
)


def print_estimate(config: Config, machine: Machine, rows: list[StageEstimate], console: Console | None = None) -> None:
    console = console or Console()
    console.print(arithmetic(config, machine), highlight=False, soft_wrap=True)
    print_memory(console, rows, machine.memory * GB)
    if rows[0].moved:
        console.print(_sum_table(rows, machine.ranks))
        console.print(_gathers(config, rows), highlight=False, soft_wrap=True)
    console.print(_speed_table(rows, machine))
    console.print(_run_table(config, rows, machine))
    for line in (_assumptions(config, machine, rows), _checkpoints(config), _recommendation(config, machine, rows)):
        console.print(line, highlight=False, soft_wrap=True)


def print_memory(console: Console, rows: list[StageEstimate], limit: float | None) -> None:
    """Memory of a rank; `limit` bytes, or None where it is not known."""
    console.print(_memory_table(rows, limit))
    if [row.stage for row in rows[:2]] == [0, 1] and rows[0].memory == rows[1].memory:
        console.print(SAME, highlight=False, soft_wrap=True)


def _memory_table(rows: list[StageEstimate], limit: float | None) -> Table:
    hosts = any(row.memory.host for row in rows)
    name, one = unit(max(size for row in rows for size in (row.memory.peak, sum(row.memory.host.values()))))
    of = "" if limit is None else f", of {amount(limit)}"
    more = [*(["host"] if hosts else []), *([] if limit is None else ["fits"])]
    table = _table(f"memory of a rank, {name}{of}", [*MEMORY, "all", *more])
    for row in rows:
        parts = row.memory.held | row.memory.passing
        cells = [_in(one, sum(parts.get(name, 0) for name in names)) for names in MEMORY.values()]
        cells.append(_in(one, row.memory.peak))
        cells += [_in(one, sum(row.memory.host.values()))] if hosts else []
        cells += [] if limit is None else ["yes" if row.memory.peak <= limit else "no"]
        table.add_row(str(row.stage), *cells)
    return table


def _speed_table(rows: list[StageEstimate], machine: Machine) -> Table:
    traffic = [(sum(c.sent(machine.ranks) for c in row.moved), row.speed.inside, row.speed.between) for row in rows]
    name, one = unit(max(size for sizes in traffic for size in sizes))
    columns = (f"{name} sent", "in node", "between", "compute s", "comm. s", "ratio", "step s", "best s")
    table = _table("traffic and time of a step", columns)
    for row, sizes in zip(rows, traffic, strict=True):
        speed = row.speed
        ratio = f"{speed.compute / speed.communication:.1f}" if speed.communication else ""
        seconds = (f"{speed.compute:.3g}", f"{speed.communication:.3g}")
        steps = (f"{speed.step:.3g}", f"{speed.best_step:.3g}")
        table.add_row(str(row.stage), *(_in(one, size) for size in sizes), *seconds, ratio, *steps)
    return table


def _sum_table(rows: list[StageEstimate], ranks: int) -> Table:
    """A row for each collective: the product of its numbers is what a rank sends."""
    name, one = unit(max(collective.sent(ranks) for row in rows for collective in row.moved))
    title = f"sent: elements x bytes x times a step x passes x {ranks - 1}/{ranks}"
    table = _table(title, ("product", f"{name} sent"))
    table.add_column("collective")
    same = [row.stage for row in rows[:2]] == [0, 1] and rows[0].moved == rows[1].moved
    for row in rows[1 if same else 0 :]:
        stage = "0, 1" if same and row.stage == 1 else str(row.stage)
        for c in row.moved:
            product = f"{c.elements:,} x {c.width} x {c.times} x {c.passes}"
            table.add_row(stage, product, _in(one, c.sent(ranks)), f"{c.collective}, {c.what}")
            stage = ""
    return table


def _gathers(config: Config, rows: list[StageEstimate]) -> str:
    """Which weights ZeRO 3 gathers how often, so that its elements can be summed by hand."""
    elements_by_times, limits = gathered_times(config), Limits()
    note = (
        f"parameters of at most {limits.persistence:,} elements are persistent: gathered after the optimizer's step "
        "alone (DeepSpeed's defaults)."
    )
    if not elements_by_times:
        return f"ZeRO 3: {note}"
    often = " and ".join(f"{elements:,} weights {_times(times)}" for times, elements in elements_by_times.items())
    parts = " + ".join(f"{times} x {elements:,}" for times, elements in elements_by_times.items())
    total = sum(times * elements for times, elements in elements_by_times.items())
    padded = "" if total == rows[-1].moved[1].elements else ", before each is padded to a multiple of the ranks"
    return (
        f"ZeRO 3 gathers {often} in a micro-batch: {parts} = {total:,} elements{padded}. What the backward pass needs "
        f"again within {limits.reuse:,} elements stays after the forward pass; {note}"
    )


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def _run_table(config: Config, rows: list[StageEstimate], machine: Machine) -> Table:
    train = config.train
    title = f"the run: {counted(train.steps, 'step')}, {train.steps * train.tokens_per_step:,} tokens"
    columns = ("tokens/s", "MFU", "days", "at best", "GPU-hours", "at best", "checkpoint")
    table = _table(title, columns)
    for row in rows:
        speed, whole, best = row.speed, row.whole, row.best
        speeds = (f"{speed.tokens_per_second:,.0f}", f"{speed.utilisation:.1%}")
        durations = map(_rounded, (whole.days, best.days, whole.gpu_hours, best.gpu_hours))
        table.add_row(str(row.stage), *speeds, *durations, amount(row.checkpoint))
    return table


def _rounded(number: float) -> str:
    """Days or hours."""
    return "<0.01" if number < 0.01 else f"{number:.2f}" if number < 100 else f"{number:,.0f}"


def _checkpoints(config: Config) -> str:
    """How many checkpoints a run keeps."""
    train = config.train
    more = f" and those of every {train.keep_every:,} steps" if train.keep_every else ""
    return (
        f"Checkpoints: a run keeps the last {train.keep_last}{more} (train.keep_last, train.keep_every); one more is "
        "on the disk while it is written."
    )


def _recommendation(config: Config, machine: Machine, rows: list[StageEstimate]) -> str:
    """The stage to take and why, or what would fit where none does."""
    choice = recommended(rows, machine)
    if choice is None:
        try:
            check_fits(config, machine.ranks, machine.memory * GB, "a GPU")
        except ValueError as error:
            return f"Recommended: no stage as it is. {error}"
    assert choice is not None  # else the config's own stage does not fit
    configured = config.distributed.zero_stage == choice.stage
    how = "the config has it" if configured else f"--distributed.zero_stage {choice.stage}"
    take = f"Recommended: ZeRO {choice.stage} ({how})"
    if not choice.moved:
        return f"{take}: one rank sends nothing, so all stages are as fast."
    faster = [row.stage for row in rows if row.speed.best_step < 0.99 * choice.speed.best_step]
    hope = f"; ZeRO {listed(faster, 'or')} would be faster only with what it sends hidden" if faster else ""
    return f"{take}: of the stages that fit the fastest with nothing hidden, one assumption for all{hope}."


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("ZeRO")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _in(one: float, size: float) -> str:
    return f"{size / one:,.2f}"


def _assumptions(config: Config, machine: Machine, rows: list[StageEstimate]) -> str:
    peak = machine.tflops or PEAK[config.train.precision]
    lines = [
        "Sent: by each rank; in node: of that to ranks of its own node, mean; between: what a node sends to "
        "others; ratio: of the time to compute to that of communication.",
        f"Assumed, not measured: {peak:g} TFLOP/s a GPU at its peak, of which a step reaches {machine.reached:.0%} "
        f"while it computes; {machine.inside:g} GB/s for a GPU inside its node and {machine.between:g} GB/s for a "
        f"node, in one direction, of which collectives reach {machine.sustained:.0%}. A step computes and sends one "
        "after the other, in every stage; at best, gradients in ZeRO 2 and all that ZeRO 3 sends take no time where it "
        "computes meanwhile. Latency, the optimizer, evaluations and what masks save are left out.",
    ]
    accumulation, machine_bytes = config.accumulation(machine.ranks), machine.memory * GB
    if accumulation > 1 and any(row.stage == 1 and row.memory.peak <= machine_bytes for row in rows) and rows[0].moved:
        lines.append(
            f"ZeRO 2 and 3 reduce gradients in each of the {accumulation} micro-batches of a step, ZeRO 0 and 1 once, "
            "for which every rank keeps the whole gradient in fp32: take ZeRO 1 where it fits."
        )
    if any(row.memory.host for row in rows):
        lines.append("Time does not count the way to the host and the update there.")
    if config.distributed.zero_hpz_partition_size > 1:
        lines.append("Traffic and time do not count what hpZ saves: gathers in its groups are taken as over all ranks.")
    return "\n".join(lines)
