"""The command that goes on with a run."""

from __future__ import annotations

from pathlib import Path


def resume_command(run: Path, ranks: int) -> str:
    """For this machine; several nodes are started as the run was (launch/README.md)."""
    launcher = "sgtm" if ranks == 1 else f"torchrun --standalone --nproc_per_node {ranks} -m sgtm"
    return f"{launcher} train {run} --resume"
