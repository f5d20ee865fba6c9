"""Measurements: the peak memory of a step, percentiles, and files of results whose every row says where, when and of
which code it was measured.
"""

from __future__ import annotations

import ctypes
import json
import platform
import subprocess
import time
from collections.abc import Callable, Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PATIENCE = 20  # seconds that another program may take


def environment() -> dict:
    """Device, threads, commit, versions and time (UTC)."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_model(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("torch", "triton", "deepspeed", "transformers")},
        "driver": driver(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def driver() -> str | None:
    """Version of the NVIDIA driver; None where nvidia-smi is missing, fails or is slower than 20 s."""
    versions = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0].strip() if versions else None


def cpu_model() -> str:
    """Name of the processor, as the system gives it."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


def cpuinfo(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo; empty where there is no such file."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith(field)), "")
    except OSError:
        return ""


def installed(package: str) -> str | None:
    """Its version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def percentiles(values: Collection[float]) -> dict[str, float]:
    """p20, p50 and p80 of a list or array, to 5 digits."""
    quantiles = torch.quantile(torch.as_tensor(values, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8]).double())
    return {f"p{p}": float(f"{value:.5g}") for p, value in zip((20, 50, 80), quantiles.tolist(), strict=True)}


def write_rows(path: Path, rows: list[dict]) -> None:
    """One JSON object per line, each with its environment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = environment()
    path.write_text("".join(json.dumps({**row, **shared}) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def peak_growth(step: Callable[[], object]) -> float:
    """MiB by which memory grows at most during a step: the process's (on Linux), or the CUDA allocator's."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - allocated) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back, or the step would grow into it unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark VmHWM
    resident = _status_mib("VmRSS")
    step()
    return _status_mib("VmHWM") - resident


def _status_mib(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def _commit() -> str | None:
    """Of this code where it is a git checkout; None where it is installed, in whatever repository that may be."""
    source = Path(__file__)
    if not _output("git", "ls-files", source.name, cwd=source.parent):
        return None
    return _output("git", "describe", "--always", "--dirty", cwd=source.parent)


def _output(*command: str, cwd: Path | None = None) -> str | None:
    """What a command prints, or None where it is missing, fails or is slower than `PATIENCE`."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE, cwd=cwd)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
