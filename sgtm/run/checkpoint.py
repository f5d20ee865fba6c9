"""Checkpoints that are whole or not there: where they are, and which of them counts.

    <run>/checkpoints/latest                   name of the newest
                      step_00000100/           what DeepSpeed wrote, or weights alone (sgtm/run/weights_only.py), and
                      step_00000100/manifest.json   size and SHA-256 of every file and of itself, step, ranks, config
                      .tmp-step_00000200/      one that is being written, or was not finished; removed at the next start
                      damaged-step_00000300/   one that was found damaged, and not resumed from; never removed

A checkpoint is written under a temporary name, flushed to the disk, renamed, and only then does `latest` move. So a run
killed at any moment, or a disk that fills up, leaves the previous one in place. Writing: sgtm/run/saving.py; resuming
from one: sgtm/run/resume.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from sgtm.config.load import load_run_config
from sgtm.config.schema import Config
from sgtm.files import sha256_of, write_atomically
from sgtm.run.located import locate_data

MANIFEST = "manifest.json"
DAMAGED = "damaged-"
TRAINING, WEIGHTS_ONLY = "training", "weights"
"""Kinds of checkpoints: what a training resumes from, and weights without the state of an optimizer."""
NAME = re.compile(r"step_\d{8,}")


def checkpoints_dir(run_dir: Path | str) -> Path:
    return Path(run_dir) / "checkpoints"


def find_latest(run_dir: Path | str) -> Path | None:
    """The newest finished checkpoint of a run, or None; not verified."""
    return next(iter(finished(run_dir)), None)


def finished(run_dir: Path | str) -> list[Path]:
    """Checkpoints that were renamed to their final name, newest first; not verified.

    `latest` is for people and other programs: a kill between the rename and its writing would make it lie. Folders of
    other names, such as copies, are neither taken nor deleted.
    """
    paths = [path for path in checkpoints_dir(run_dir).glob("step_*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(paths, key=step_of, reverse=True)


def renamed(run_dir: Path | str) -> list[str]:
    """Names of folders that hold a checkpoint under a name of somebody's own, so that no resume finds it."""
    folders = sorted(path.parent for path in checkpoints_dir(run_dir).glob(f"[!.]*/{MANIFEST}"))
    return [path.name for path in folders if not NAME.fullmatch(path.name) and not path.name.startswith(DAMAGED)]


def step_of(checkpoint: Path) -> int:
    """Global steps that were done, from the name of a finished checkpoint."""
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints_at(path: Path | str) -> list[Path]:
    """Those of a run directory, newest first, or the one that `path` is. Raises ValueError where there is none."""
    path = Path(path)
    checkpoints = finished(path) or ([path] if path.name.startswith(("step_", DAMAGED)) and path.is_dir() else [])
    if not checkpoints:
        raise ValueError(f"{path} holds no checkpoint; give a run directory, or <run>/checkpoints/step_...")
    return checkpoints


def remove_unfinished(run_dir: Path | str) -> None:
    """Remove what a killed run had begun to write. For the start of a run, on one rank."""
    root = checkpoints_dir(run_dir)
    for path in root.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in root.glob("*.tmp"):
        path.unlink()


def set_aside(damaged: Path) -> Path:
    """Take a damaged checkpoint out of those that count, and out of those that retention counts."""
    aside = damaged.with_name(f"{DAMAGED}{damaged.name}")
    number = 1
    while aside.exists():
        number += 1
        aside = damaged.with_name(f"{DAMAGED}{damaged.name}-{number}")
    return damaged.rename(aside)


def write_manifest(directory: Path, manifest: dict) -> None:
    """Write what `read_manifest` reads, with the SHA-256 of its content, which shows a flipped bit."""
    write_atomically(directory / MANIFEST, json.dumps({"sha256": _digest(manifest), **manifest}, indent=1))


def _digest(manifest: dict) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> dict:
    """The manifest of a checkpoint. Raises ValueError where it is missing or damaged."""
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if manifest["sha256"] != _digest(manifest):
            raise ValueError(f"{path} is damaged: the SHA-256 in it does not match its content")
        manifest = {
            **{key: manifest[key] for key in ("step", "ranks", "corpus", "config", "files")},
            # Keys that the first checkpoints lack:
            "independent_of": manifest.get("independent_of", []),
            "kind": manifest.get("kind", TRAINING),
            "direction": manifest.get("direction"),
        }
        sizes = [(entry["bytes"], entry["sha256"]) for entry in manifest["files"].values()]
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the checkpoint is incomplete") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    except KeyError as error:
        raise ValueError(f"{path} is damaged: key {error} is missing") from None
    except (TypeError, AttributeError):  # a list for a mapping, a number for a list
        raise ValueError(f"{path} is damaged: its JSON is not that of a manifest") from None
    if not sizes:
        raise ValueError(f"{path} is damaged: it lists no files")
    return manifest


def check_same_corpus(
    run: Path,
    manifest: dict,
    path: Path | str,
    fingerprint: str,
    otherwise: str = "or give its folder with --data.path",
) -> None:
    """Raises ValueError where a run was trained on another corpus than the one at `path`, which has this fingerprint.

    manifest   of a checkpoint of the run
    otherwise  what to do in place of restoring the corpus
    """
    if manifest["corpus"] != fingerprint:
        raise ValueError(f"{run} was trained on another corpus than {path}; restore that corpus, {otherwise}")


def verify(directory: Path | str, share: tuple[int, int] = (0, 1)) -> None:
    """Raise ValueError, naming the file, unless every file of a checkpoint is as it was written.

    share  (i, n): look at every n-th file only, from the i-th, so that n ranks divide the reading
    """
    directory = Path(directory)
    files = read_manifest(directory)["files"]
    for name, entry in sorted(files.items())[share[0] :: share[1]]:
        path = directory / name
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                truncated = f"{size} of {entry['bytes']} bytes (truncated)"
                longer = f"{size} bytes instead of {entry['bytes']}"
                raise ValueError(f"{path} has {truncated if size < entry['bytes'] else longer}")
            if sha256_of(path) != entry["sha256"]:
                raise ValueError(f"{path} is damaged: its SHA-256 does not match {MANIFEST}")
        except FileNotFoundError:
            raise ValueError(f"{path} is missing") from None
        except OSError as error:  # as a disk reports a bad sector
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def newest_whole(
    checkpoints: list[Path], check: Callable[[Path], None] = verify
) -> tuple[Path | None, dict[Path, str]]:
    """The first of these that `check` finds whole, or None, and what is wrong with those before it.

    check  raises ValueError for a damaged one
    """
    wrong: dict[Path, str] = {}
    for directory in checkpoints:
        try:
            check(directory)
        except ValueError as error:
            wrong[directory] = str(error)
        else:
            return directory, wrong
    return None, wrong


def open_run(run_dir: Path | str, data: str | None = None) -> tuple[Config, Path]:
    """Config and newest whole checkpoint of a run that is to be evaluated or exported.

    data  `data.path` to take; None: that of the run, found from any working directory (sgtm/run/located.py)

    A damaged newer one is reported on stderr. Raises ValueError for a folder that is no run, has no checkpoint, or none
    that is whole.
    """
    config = locate_data(load_run_config(Path(run_dir)), Path(run_dir), data)
    checkpoints = finished(run_dir)
    if not checkpoints:
        unfinished = sorted(path.name for path in checkpoints_dir(run_dir).glob(".tmp-step_*"))
        if unfinished:
            raise ValueError(
                f"{run_dir} has no finished checkpoint: {unfinished[-1]} is being written, or a run that was killed "
                f"left it; wait for it, or go on with `sgtm train {run_dir} --resume`"
            )
        raise ValueError(f"{run_dir} has no checkpoint yet; train first")
    newest, wrong = newest_whole(checkpoints)
    if newest is None:
        raise ValueError(none_whole(wrong))
    for problem in wrong.values():
        print(f"warning: {problem}; taking {newest}", file=sys.stderr)
    return config, newest


def none_whole(wrong: dict[Path, str]) -> str:
    """The message where `newest_whole` finds none: what is wrong with each, and the remedy."""
    remedy = "put back copies of these files, or train from the beginning with --overwrite"
    return "\n  ".join(["no checkpoint is valid:", *wrong.values()]) + f"\n{remedy}"


def resolved(config: Config) -> dict:
    """The config as a manifest keeps it, spelled out, with the kernel backend that runs: another one adds in another
    order.
    """
    from sgtm.distributed.env import kernel_backend  # torch, which `sgtm checkpoint verify` does without
    from sgtm_kernels.dispatch import served

    values = config.spelled_out()
    values["kernels"]["backend"] = served(kernel_backend(config.kernels, config.train.precision))
    return values
