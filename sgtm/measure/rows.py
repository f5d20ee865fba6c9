"""Result rows: time and memory of a step, relative to another step of the same rounds, and whether it meets its target.

- wall, cpu: seconds of a step, p20/p50/p80 like all that follow: wall time, and CPU time of its process
- ratio: wall time for a token, to that of the step `of` in the same round; cpu_ratio: the same of CPU time
- tokens_per_second: of the step `of` (for the first of all steps: of its median time), over the p50 of `ratio`. So the
  tokens/s of two rows and the ratio between them agree, whatever the machine did meanwhile
- target, missed: the project's target for this step, and whether the p50 of its quantity is beyond it
- peak_mib, memory_ratio: peak memory, and its ratio to that of the step `of`
- error: instead of all these, if the step failed
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sgtm.measure.rounds import Sample
from sgtm_kernels.measurement import environment, percentiles


@dataclass(frozen=True)
class Target:
    """A bound of a row's number. what: `cpu_ratio`, `ratio` or `tokens_per_second`; at_least: else at most."""

    what: str
    bound: float
    at_least: bool = False

    def missed(self, row: dict) -> bool:
        value = row[self.what]
        value = value["p50"] if isinstance(value, dict) else value
        return value < self.bound if self.at_least else value > self.bound

    def __str__(self) -> str:
        what = {"cpu_ratio": "CPU", "ratio": "time", "tokens_per_second": "tokens/s"}[self.what]
        bound = f"{self.bound:,}" if self.bound >= 1000 else f"{self.bound:.2f}"
        return f"{what} {'>=' if self.at_least else '<='} {bound}"


# Of `sgtm bench`, in CPU time, because wall time on a busy machine is unreliable. A pure forget step with joint
# parameters free has 91 % of the unmasked matmul work at the 18M shape.
CPU_TARGETS = {
    "tinystories-18m": {
        "nothing masked": Target("cpu_ratio", 1.01),
        "25 % forget sequences": Target("cpu_ratio", 1.00),
        "pure forget": Target("cpu_ratio", 0.93),
        "pure forget, joint masked": Target("cpu_ratio", 0.80),
    }
}
PEER_TARGETS = {"tinystories-18m": Target("ratio", 1.8, at_least=True)}  # of Hugging Face's time for a token to ours
GPU_TARGETS = {percent: Target("ratio", bound) for percent, bound in {0: 1.00, 5: 1.00, 25: 0.96, 100: 0.80}.items()}
# Unmasked, on one H100.
SPEED_TARGETS = {
    name: Target("tokens_per_second", speed, at_least=True)
    for name, speed in {"124m": 460_000, "254m": 290_000, "llama-1b": 50_000}.items()
}


@dataclass(frozen=True)
class Parent:
    """The step that another is compared with, its tokens/s, and its memory between steps and during one."""

    name: str
    sample: Sample
    tokens_per_second: float
    peak: float


def row(
    name: str, sample: Sample, parent: Parent | None, target: Target | None = None, held: float = 0.0
) -> dict[str, Any]:
    """One row. parent None: the step that all others are compared with. held: MiB that stay between steps."""
    peak = held + sample.peak
    result: dict[str, Any] = {"row": name, "wall": percentiles(sample.wall), "cpu": percentiles(sample.cpu)}
    if parent is None:
        result |= {"of": None, "tokens_per_second": round(sample.tokens / float(np.median(sample.wall)), 1)}
    else:
        base, tokens = parent.sample, sample.tokens
        ratio = percentiles(sample.wall / tokens * base.tokens / base.wall)
        result |= {
            "of": parent.name,
            "ratio": ratio,
            "cpu_ratio": percentiles(sample.cpu / tokens * base.tokens / base.cpu),
            "tokens_per_second": round(parent.tokens_per_second / ratio["p50"], 1),
            "memory_ratio": round(peak / parent.peak, 4) if parent.peak else None,
        }
    result |= {"tokens": round(sample.tokens), "peak_mib": round(peak, 1), "rounds": len(sample.wall)}
    missed = target.missed(result) if target is not None and target.what in result else None
    return result | {"target": str(target) if target else None, "missed": missed}


def as_parent(result: dict[str, Any], sample: Sample) -> Parent:
    """The step of a row, for others to be compared with."""
    return Parent(result["row"], sample, result["tokens_per_second"], result["peak_mib"])


def failure(name: str, error: str) -> dict[str, Any]:
    """The row of a step that could not be taken."""
    return {"row": name, "error": error}


class RowFile:
    """A file to which rows are appended as they are measured, one JSON object per line, synced to disk on every write.

    Every row carries device, time and commit (`environment`). `path` None: nothing is written.
    """

    def __init__(self, path: Path | None):
        self.path, self.shared = path, environment() if path else {}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, rows: list[dict]) -> None:
        if self.path is None:
            return
        with self.path.open("a") as file:
            file.writelines(json.dumps(row | self.shared) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())


def table(rows: list[dict]) -> str:
    """Rows as aligned text; of wall time p20, p50 and p80 over the rounds, of CPU time p50."""
    header = ["row", "tokens/s", "time p20/p50/p80", "CPU", "peak MiB", "memory"]
    backends = len({row.get("backend") for row in rows}) > 1
    targets = any(row.get("target") for row in rows)
    lines = [["backend"] * backends + header + ["target"] * targets]
    for row in rows:
        name = row["row"] + " *" * bool(row.get("mean_of"))
        cells = [name, "failed", row["error"]] if "error" in row else [name, *_cells(row)]
        lines.append([row.get("backend") or ""] * backends + cells + [_target(row)] * (targets and "error" not in row))
    whole = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(len(line[i]) for line in whole) for i in range(len(lines[0]))]
    texts = 1 + backends  # columns that are not numbers
    text = []
    for line in lines:
        cells = [c.ljust(w) if i < texts or i == len(header) + backends else c.rjust(w)
                 for i, (c, w) in enumerate(zip(line, widths, strict=False))]  # fmt: skip
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def _cells(row: dict) -> list[str]:
    spread = "/".join(f"{v:.3f}" for v in row["ratio"].values()) if "ratio" in row else "1"
    cpu = f"{row['cpu_ratio']['p50']:.3f}" if "cpu_ratio" in row else "1"
    memory = f"{row['memory_ratio']:.3f}" if row.get("memory_ratio") else ""
    return [f"{row['tokens_per_second']:,.0f}", spread, cpu, f"{row['peak_mib']:,.0f}", memory]


def _target(row: dict) -> str:
    if not row.get("target"):
        return ""
    verdict = {True: "MISSED", False: "met", None: "not comparable"}[row["missed"]]
    return f"{row['target']}: {verdict}"
