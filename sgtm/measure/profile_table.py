"""The tables of a profile for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sgtm.measure.ranges import MODULES, PHASES
from sgtm.measure.trace import OTHER

TOP = 15


def print_profile(summary: dict, out: Path, console: Console | None = None) -> None:
    """Print a `summary.json`: time by range, the kernels that take longest, and where the files are."""
    console = console or Console()
    busy = summary["kernel_ms_per_step"] / summary["ms_per_step"]
    about = (
        f"{summary['name']}: {summary['steps']} step(s) of {summary['ms_per_step']:,.1f} ms under the profiler, which "
        f"slows it; {summary['kernel']} {summary['kernel_ms_per_step']:,.1f} ms ({busy:.0%}); kernels "
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
    found = [[row for row in part if row] for part in parts]
    times = [sum(row["ms_per_step"] for row in part) for part in found]
    share = sum(row["share"] for part in found for row in part)
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
        table.add_row(f"{len(rows) - TOP} others", f"{calls:,.4g}", f"{ms:,.3f}", f"{share:.1%}")
    return table
