"""`sgtm plan`: the plan of a run as tables, one row for each ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sgtm.config.schema import Config
from sgtm.plan.rows import Row, arithmetic
from sgtm.plan.speed import PEAK, Machine
from sgtm.plan.units import GB, amount, unit

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


def print_plan(config: Config, machine: Machine, rows: list[Row], console: Console | None = None) -> None:
    console = console or Console()
    console.print(arithmetic(config, machine), highlight=False, soft_wrap=True)
    print_memory(console, rows, machine.memory * GB)
    console.print(_speed_table(rows, machine))
    console.print(_assumptions(config, machine, rows), highlight=False, soft_wrap=True)


def print_memory(console: Console, rows: list[Row], limit: float | None) -> None:
    """Memory of a rank; `limit` bytes, or None where it is not known."""
    console.print(_memory_table(rows, limit))
    if [row.stage for row in rows[:2]] == [0, 1] and rows[0].memory == rows[1].memory:
        console.print(SAME, highlight=False, soft_wrap=True)


def _memory_table(rows: list[Row], limit: float | None) -> Table:
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


def _speed_table(rows: list[Row], machine: Machine) -> Table:
    traffic = [(sum(c.sent(machine.ranks) for c in row.moved), row.speed.inside, row.speed.between) for row in rows]
    name, one = unit(max(size for sizes in traffic for size in sizes))
    columns = (f"{name} sent", "in node", "between", "compute s", "comm. s", "ratio", "tokens/s", "MFU")
    table = _table("traffic and time of a step", columns)
    for row, sizes in zip(rows, traffic, strict=True):
        found = row.speed
        ratio = f"{found.compute / found.communication:.1f}" if found.communication else ""
        seconds = (f"{found.compute:.3g}", f"{found.communication:.3g}")
        speed = (f"{found.tokens_per_second:,.0f}", f"{found.utilisation:.1%}")
        table.add_row(str(row.stage), *(_in(one, size) for size in sizes), *seconds, ratio, *speed)
    return table


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("ZeRO")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _in(one: float, size: float) -> str:
    return f"{size / one:,.2f}"


def _assumptions(config: Config, machine: Machine, rows: list[Row]) -> str:
    peak = machine.tflops or PEAK[config.train.precision]
    lines = [
        "Sent: by each rank; in node: of that to ranks of its own node, mean; between: what a node sends to "
        "others; ratio: of the time to compute to that of communication.",
        f"Assumed, not measured: {peak:g} TFLOP/s a GPU at its peak, of which a step reaches {machine.reached:.0%} "
        f"while it computes; {machine.inside:g} GB/s for a GPU inside its node and {machine.between:g} GB/s for a "
        f"node, in one direction, of which collectives reach {machine.sustained:.0%}. Gradients in ZeRO 2, and all "
        "that ZeRO 3 sends, move while it computes; the rest does not. Latency, the optimizer and what masks save are "
        "left out.",
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
