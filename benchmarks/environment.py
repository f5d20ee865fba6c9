"""Where a result comes from: what every row of a results file carries."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from sgtm.doctor import cpu_model

RESULTS = Path(__file__).parent / "results"


def environment() -> dict:
    """Device, threads, commit, versions and time (UTC)."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_model(),
        "threads": torch.get_num_threads(),
        "commit": output("git", "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("torch", "triton", "deepspeed", "transformers")},
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def output(*command: str) -> str | None:
    """What a command prints, or None where there is no such command."""
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=RESULTS.parent).stdout.strip()


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_rows(path: Path, rows: list[dict]) -> None:
    """One JSON object per line, each with its environment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = environment()
    path.write_text("".join(json.dumps({**row, **shared}) + "\n" for row in rows))


def percentiles(values: np.ndarray) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(values, p)), 4) for p in (20, 50, 80)}


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
