"""Where the data of a run are, seen from any working directory.

`data.path` and `runs` in a run's config.yaml are as the user has written them, often relative to where the training was
started. That folder follows from the run's own (one with `runs: runs` at /home/me/project/runs/mine was started in
/home/me/project, also after the project has moved), and is in its file `trained_in`.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from sgtm.config.errors import ConfigError
from sgtm.config.load import load_run_config
from sgtm.config.schema import RUN_NAME, Config
from sgtm.data.store import check_split, read_manifest
from sgtm.files import write_atomically

FILE = "trained_in"
SYNTHETIC = "synthetic"


def record_folder(run: Path) -> None:
    """Write into the run directory which directory relative paths of its config are relative to: this one."""
    write_atomically(run / FILE, f"{Path.cwd()}\n")


def locate_data(config: Config, run: Path, data: str | None = None) -> Config:
    """The config of the run directory `run`, with its data found from here.

    data  `data.path` to take instead

    Relative paths are looked for where the run was started, as its path shows and as it has recorded, then here. The
    config is unchanged where they are nowhere, and where they are here.
    """
    if data is not None:
        return _with(config, data=data)
    folders = _folders(config, run)
    if config.data.path != SYNTHETIC:
        paths = (folder / config.data.path for folder in folders)
        path = next((path for path in paths if path.exists()), None)
        same = path is None or path == Path(config.data.path).absolute()
        return config if same else _with(config, data=str(path))
    roots = [Path(os.path.abspath(run)).parent, *(folder / config.runs for folder in folders)]
    name = f"{SYNTHETIC}-{config.model.vocab_size}"
    runs = next((folder for folder in roots if (folder / name).exists()), None)
    same = runs is None or runs == Path(config.runs).absolute()
    return config if same else config.model_copy(update={"runs": str(runs)})


def folders_tried(config: Config, run: Path) -> str:
    """Where `locate_data` looks for a relative `data.path`, for messages; empty for an absolute one."""
    if config.data.path == SYNTHETIC or Path(config.data.path).is_absolute():
        return ""
    return ", ".join(dict.fromkeys(str(folder) for folder in _folders(config, run)))


def check_data(config: Config, run: Path, data: str | None = None) -> None:
    """Raises ValueError where the corpus of a run is gone; `synthetic` is looked for where it is opened.

    config  as `locate_data` gives it; data: as it took it
    """
    if config.data.path == SYNTHETIC or Path(config.data.path).exists():
        return
    tried = "" if data is not None else folders_tried(config, run)
    raise ValueError(
        f"no corpus at {config.data.path}{f', relative to {tried}' if tried else ''}: the folder does not exist; "
        f"restore it, or give the folder of the run's corpus with --data.path DIR"
    )


def check_run(run: Path, data: str | None = None, split: str | None = None) -> Config:
    """The config of a run that is to be measured, before anything heavy is imported.

    data  `data.path` to take instead of the run's

    Raises ConfigError or ValueError for a folder that is no run, data that are gone, and a split that they lack.
    """
    config = load_run_config(run)
    located = locate_data(config, run, data)
    check_data(located, run, data)
    if split is not None and located.data.path != SYNTHETIC:
        folder = Path(located.data.path)
        check_split(folder, read_manifest(folder).splits, split)
    return config


def overrides_of(run: Path) -> list[str]:
    """The overrides that give a run's own config its directory, and its data and direction from any working directory.

    Raises ConfigError for a directory whose name no run may have.
    """
    if not re.fullmatch(RUN_NAME, run.name):
        raise ConfigError(f"{run}: a run directory has the run's name, of letters, digits and . + - _; rename it")
    config = load_run_config(run)
    data, direction = locate_data(config, run).data.path, config.steering.direction
    overrides = [f"--runs={run.parent}", f"--name={run.name}", f"--data.path={data}"]
    if direction is None:
        return overrides
    paths = (folder / direction for folder in _folders(config, run))
    return [*overrides, f"--steering.direction={next((path for path in paths if path.exists()), direction)}"]


def _folders(config: Config, run: Path) -> list[Path]:
    """Where the run was started, most likely first."""
    absolute = Path(os.path.abspath(run))
    tail = (*Path(config.runs).parts, config.name)
    tails = [] if Path(config.runs).is_absolute() or ".." in tail or absolute.parts[-len(tail) :] != tail else [tail]
    folders = [Path(*absolute.parts[: -len(tail)]) for tail in tails]
    with suppress(OSError, UnicodeDecodeError):
        folders.append(Path((run / FILE).read_text("utf-8").strip()))
    return [folder for folder in (*folders, Path.cwd()) if folder.is_absolute()]


def _with(config: Config, data: str) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"path": data})})
