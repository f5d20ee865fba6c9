"""Checkpoints that are whole or not there.

    <run>/checkpoints/latest                   name of the newest
                      step_00000100/           what DeepSpeed wrote (so its universal checkpoint works), and
                      step_00000100/manifest.json   size and SHA-256 of every file, the step, the ranks, the config
                      .tmp-step_00000200/      one that was not finished; removed at the next start

A checkpoint is written under a temporary name, flushed to the disk, renamed, and only then does `latest` move. So a run
killed at any moment, or a disk that fills up, leaves the previous one in place. Resuming on as many ranks continues bit
by bit (tests/dist/test_checkpoint.py): weights, moments and step counts come from the files, the learning rate and the
data are functions of the step.

All ranks call `save_checkpoint` and `load_checkpoint`, and see the same directory.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sgtm.config.load import load_run_config
from sgtm.config.schema import Config
from sgtm.distributed.agree import on_every_rank, on_rank_zero
from sgtm.files import sha256_of, write_atomically
from sgtm.train.resume import resume_command
from sgtm_kernels.dispatch import resolve

if TYPE_CHECKING:
    from sgtm.distributed.engine import Engine  # evaluation and export read checkpoints without DeepSpeed

MANIFEST = "manifest.json"
# What a run must share with its checkpoint to be its continuation, less what changes no number.
SAME = (
    "model",
    "masking",
    "data",
    "optimizer",
    "train.steps",
    "train.tokens_per_step",
    "train.micro_batch",
    "train.precision",
    "train.init_from",
    "kernels.backend",
    "distributed.zero_stage",
)
MAY_DIFFER = ("model.activation_checkpointing",)


def checkpoints_dir(run_dir: Path | str) -> Path:
    return Path(run_dir) / "checkpoints"


def save_checkpoint(
    engine: Engine, run_dir: Path | str, step: int, config: Config, corpus: str = "", progress: object = None
) -> Path:
    """Save the run after `step` global steps, and drop checkpoints beyond `train.keep_last`.

    corpus    fingerprint of the data, which a resumed run must share
    progress  whatever this rank needs to go on in the middle of an interval; `load_checkpoint` gives it back
    Every rank raises OSError, naming the file, the reason and the checkpoint that remains, if any rank cannot write.
    """
    root = checkpoints_dir(run_dir)
    final = root / f"step_{step:08d}"
    temporary = root / f".tmp-{final.name}"
    try:
        on_rank_zero(lambda: _fresh(temporary))
        ranks = on_every_rank(lambda: {"random": _random_state(engine), "progress": progress})
        files = engine.save(temporary, {"step": step, "ranks": ranks})
        manifest = {
            "step": step,
            "ranks": engine.world_size,
            "corpus": corpus,
            "config": _resolved(config),
        }
        on_rank_zero(lambda: _publish(temporary, final, {**manifest, "files": files}, config.train.keep_last))
    except OSError as error:
        on_rank_zero(lambda: shutil.rmtree(temporary, ignore_errors=True))
        kept = find_latest(run_dir)
        rest = f"the last whole one is {kept}" if kept else "there is no earlier one"
        raise OSError(f"checkpoint {final} could not be saved: {error}; {rest}") from error
    return final


def find_latest(run_dir: Path | str) -> Path | None:
    """The newest finished checkpoint of a run, or None; not verified.

    That is the one `latest` names, and where it names none (an empty or damaged file) the newest there is.
    """
    root = checkpoints_dir(run_dir)
    pointer = root / "latest"
    name = pointer.read_text("utf-8", "replace").strip() if pointer.is_file() else ""
    if name.startswith("step_") and "\0" not in name and (root / name).is_dir():
        return root / name
    return next(iter(_finished(root)), None)


def remove_unfinished(run_dir: Path | str) -> None:
    """Remove what a killed run had begun to write. For the start of a run, on one rank."""
    root = checkpoints_dir(run_dir)
    for path in root.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in root.glob("*.tmp"):
        path.unlink()


def read_manifest(directory: Path) -> dict:
    """The manifest of a checkpoint. Raises ValueError where it is missing or damaged."""
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        manifest = {key: manifest[key] for key in ("step", "ranks", "corpus", "config", "files")}
        sizes = [(entry["bytes"], entry["sha256"]) for entry in manifest["files"].values()]
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: not a whole checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: it lacks or misstates {error}") from None
    if not sizes:
        raise ValueError(f"{path} is damaged: it lists no files")
    return manifest


def verify(directory: Path | str, share: tuple[int, int] = (0, 1)) -> None:
    """Raise ValueError, naming the file, unless every file of a checkpoint is as it was written.

    share  (i, n): look at every n-th file only, from the i-th, so that n ranks divide the reading
    """
    directory = Path(directory)
    files = read_manifest(directory)["files"]
    for name, entry in sorted(files.items())[share[0] :: share[1]]:
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, written were {entry['bytes']}: cut short?")
        if sha256_of(path) != entry["sha256"]:
            raise ValueError(f"{path} is damaged: its SHA-256 is not that of {MANIFEST}")


def load_checkpoint(engine: Engine, directory: Path | str, config: Config, corpus: str = "") -> tuple[int, object]:
    """Continue from a checkpoint: weights, optimizer and random states.

    Returns the number of global steps done, and what this rank saved as `progress`.
    Every rank raises ValueError for a damaged checkpoint, naming the newest whole one before it, and for one whose run
    differs from `config`, naming the keys.
    """
    directory = Path(directory)
    on_rank_zero(lambda: _refuse_other_run(directory, config, corpus, engine.world_size))
    try:
        on_every_rank(lambda: verify(directory, (engine.rank, engine.world_size)))
    except ValueError as error:
        raise ValueError(f"{error}. {on_rank_zero(lambda: _advice(directory))}") from None
    state = engine.load(directory)
    mine = state["ranks"][engine.rank]
    torch.set_rng_state(mine["random"]["cpu"])
    if engine.device.type == "cuda":
        torch.cuda.set_rng_state(mine["random"]["cuda"], engine.device)
    return state["step"], mine["progress"]


def open_run(run_dir: Path | str) -> tuple[Config, Path]:
    """Config and newest checkpoint, verified, of a run that is to be evaluated or exported.

    Raises ValueError for a folder that is no run, has no checkpoint, or whose newest checkpoint is damaged.
    """
    config = load_run_config(Path(run_dir))
    latest = find_latest(run_dir)
    if latest is None:
        raise ValueError(f"{run_dir} has no checkpoint yet; train first")
    try:
        verify(latest)
    except ValueError as error:
        raise ValueError(f"{error}. {_advice(latest)}") from None
    return config, latest


def differences(saved: dict, config: Config) -> list[str]:
    """`key: saved, now` for every key in which a saved config is another run than `config`."""
    before, now = _flat(saved), _flat(_resolved(config))
    keys = [key for key in now | before if f"{key}.".startswith(tuple(f"{same}." for same in SAME))]
    changed = [key for key in keys if before.get(key) != now.get(key) and key not in MAY_DIFFER]
    by = {"kernels.backend": " by SGTM_KERNELS"} if os.environ.get("SGTM_KERNELS") else {}
    return [f"{key}: {before.get(key)} in the checkpoint, {now.get(key)} now{by.get(key, '')}" for key in changed]


def _resolved(config: Config) -> dict:
    """The config with the kernel backend that runs: another one adds in another order."""
    values = config.model_dump(mode="json")
    values["kernels"]["backend"] = resolve(config.kernels.backend)
    return values


def _flat(section: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _refuse_other_run(directory: Path, config: Config, corpus: str, ranks: int) -> None:
    manifest = read_manifest(directory)
    changed = differences(manifest["config"], config)
    own = f"\nsgtm train {directory.parents[1]} --resume takes those of the run; for others, set another --name"
    remedy = own if changed else ""
    if manifest["corpus"] != corpus:
        changed.append(f"data.path: {config.data.path} has been prepared anew since, with other content")
    if manifest["ranks"] != ranks:
        command = resume_command(directory.parents[1], manifest["ranks"])
        changed.append(f"ranks: {manifest['ranks']} in the checkpoint, {ranks} now; start it with: {command}")
    if changed:
        raise ValueError(f"{directory} was written with other settings:\n  " + "\n  ".join(changed) + remedy)


def _advice(damaged: Path) -> str:
    for older in _finished(damaged.parent):
        if older.name < damaged.name:
            try:
                verify(older)
            except ValueError:
                continue
            return f"The newest whole checkpoint before it is {older}: remove {damaged} to resume from there"
    return "There is no whole checkpoint before it"


def _finished(root: Path) -> list[Path]:
    """Checkpoints that were renamed to their final name, newest first."""
    return sorted((path for path in root.glob("step_*") if (path / MANIFEST).is_file()), reverse=True)


def _fresh(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _publish(temporary: Path, final: Path, manifest: dict, keep_last: int) -> None:
    write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=1))
    _sync(temporary)
    if final.exists():  # the same step again: a run resumed from an earlier one, with the same content
        replaced = final.with_name(f".tmp-replaced-{final.name}")
        _fresh(replaced)
        os.replace(final, replaced)
        shutil.rmtree(replaced, ignore_errors=True)
    os.replace(temporary, final)
    write_atomically(final.parent / "latest", final.name + "\n")
    _sync(final.parent)
    earlier = [path for path in _finished(final.parent) if path.name < final.name]
    for path in earlier[keep_last - 1 :]:
        shutil.rmtree(path)


def _sync(directory: Path) -> None:
    """Flush the names in a directory, as a rename is only safe on the disk when its directory is."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _random_state(engine: Engine) -> dict:
    """The random state of this rank: of torch on the CPU and on its GPU."""
    state = {"cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(engine.device)
    return state
