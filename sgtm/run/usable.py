"""Whether a run directory may be used; imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path

from sgtm.run.checkpoint import WEIGHTS_ONLY, checkpoints_dir, find_latest, finished, read_manifest, renamed


def check_usable(run: Path, resume: bool, overwrite: bool) -> None:
    """Raises ValueError for a run directory that is there and may not be used; changes nothing."""
    if run.parent.exists() and not run.parent.is_dir():
        raise ValueError(f"runs: {run.parent} is a file, but it takes a folder")
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run} is a file, in the place of the run directory; move it away, or set another --name")
    if not run.exists() or not any(run.iterdir()):
        return
    if overwrite and not (run / "config.yaml").exists():
        raise ValueError(f"{run} holds other files and no run (no config.yaml); it is not overwritten")
    if not (resume or overwrite):
        raise ValueError(
            f"run directory {run} exists; continue with --resume, start over with --overwrite, or set another --name"
        )
    checkpoints = checkpoints_dir(run)
    if os.path.lexists(checkpoints) and not checkpoints.is_dir() and not overwrite:
        raise ValueError(
            f"{checkpoints} is no folder, but a file or a link to nothing; put the folder back, or move it away to "
            f"train from the beginning"
        )
    if resume and not finished(run) and (names := renamed(run)):
        raise ValueError(
            f"{checkpoints} holds {', '.join(names)}, and no checkpoint named step_ and eight digits of its step; "
            f"rename them back, or start over with --overwrite"
        )
    if resume and (latest := find_latest(run)) and _kind_of(latest) == WEIGHTS_ONLY:
        raise ValueError(
            f"{latest} holds weights alone, without the optimizer's state: {run} cannot be resumed. Train a new run "
            f"from its weights: sgtm export {run} --out FOLDER, and --train.init_from FOLDER"
        )


def _kind_of(checkpoint: Path) -> str | None:
    """None for a damaged one, which a resume passes over."""
    try:
        return read_manifest(checkpoint)["kind"]
    except ValueError:
        return None
