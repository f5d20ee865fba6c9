"""`sgtm plan`: the plan of a run as tables, one row for each ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sgtm.config.schema import Config
from sgtm.plan.fit import GB
from sgtm.plan.rows import Row, arithmetic
from sgtm.plan.speed import PEAK, Machine

MEMORY = {
    "weights": ("weights", "gathered weights"),
    "gradients": ("gradients",),
    "optimizer": ("fp32 weights", "moments"),
    "activations": ("activations",),
    "buffers": ("bucket", "buckets", "working"),
}


def print_plan(config: Config, machine: Machine, rows: list[Row], console: Console | None = None) -> None:
    console = console or Console()
    console.print(arithmetic(config, machine), highlight=False, soft_wrap=True)
    console.print(memory_table(rows, machine.memory))
    console.print(_speed_table(rows, machine))
    console.print(_assumptions(config, machine, rows), highlight=False, soft_wrap=True)


def memory_table(rows: list[Row], limit: float | None) -> Table:
    """GB of one rank; `limit` GB, or None where it is not known."""
    of = "" if limit is None else f", of {limit:g}"
    hosts = any(row.memory.host for row in rows)
    more = [*(["host"] if hosts else []), *([] if limit is None else ["fits"])]
    table = _table(f"memory of a rank, GB{of}", [*MEMORY, "all", *more])
    for row in rows:
        parts = row.memory.held | row.memory.passing
        cells = [_gb(sum(parts.get(name, 0) for name in names)) for names in MEMORY.values()]
        cells.append(_gb(row.memory.peak))
        cells += [_gb(sum(row.memory.host.values()))] if hosts else []
        cells += [] if limit is None else ["yes" if row.memory.peak <= limit * GB else "no"]
        table.add_row(str(row.stage), *cells)
    return table


def _speed_table(rows: list[Row], machine: Machine) -> Table:
    columns = ("GB sent", "in node", "between", "compute s", "comm. s", "ratio", "tokens/s", "MFU")
    table = _table("traffic and time of a step", columns)
    for row in rows:
        found, sent = row.speed, sum(collective.sent(machine.ranks) for collective in row.moved)
        ratio = f"{found.compute / found.communication:.1f}" if found.communication else ""
        seconds = (f"{found.compute:.3g}", f"{found.communication:.3g}")
        speed = (f"{found.tokens_per_second:,.0f}", f"{found.utilisation:.1%}")
        table.add_row(str(row.stage), *map(_gb, (sent, found.inside, found.between)), *seconds, ratio, *speed)
    return table


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("ZeRO")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _gb(size: float) -> str:
    return f"{size / GB:,.2f}"


def _assumptions(config: Config, machine: Machine, rows: list[Row]) -> str:
    peak = machine.tflops or PEAK[config.train.precision]
    lines = [
        "GB sent by each rank; in node: of that to ranks of its own node, mean; between: GB that a node sends to "
        "others; ratio: of the time to compute to that of communication.",
        f"Assumed, not measured: {peak:g} TFLOP/s a GPU at its peak, of which a step reaches {machine.reached:.0%} "
        f"while it computes; {machine.inside:g} GB/s for a GPU inside its node and {machine.between:g} GB/s for a "
        f"node, in one direction, of which collectives reach {machine.sustained:.0%}. ZeRO 3 communicates while it "
        "computes, the others do not. Latency, the optimizer and what masks save are left out.",
    ]
    if any(row.memory.host for row in rows):
        lines.append("Time does not count the way to the host and the update there.")
    return "\n".join(lines)
