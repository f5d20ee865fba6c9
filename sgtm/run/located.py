"""Where the data of a run are, seen from any working directory.

`data.path` and `runs` in a run's config.yaml are as the user has written them, often relative to where the training was
started. That place follows from the run's own (one with `runs: runs` at /home/me/project/runs/mine was started in
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
from sgtm.files import write_atomically

FILE = "trained_in"
SYNTHETIC = "synthetic"


def record_place(run: Path) -> None:
    """Write into the run directory which directory relative paths of its config are relative to: this one."""
    write_atomically(run / FILE, f"{Path.cwd()}\n")


def locate_data(config: Config, run: Path, data: str | None = None) -> Config:
    """The config of the run directory `run`, with its data found from here.

    data  `data.path` to take instead

    Relative paths are looked for where the run was started, as its place shows and as it has recorded, then here. The
    config is unchanged where they are nowhere, and where they are here.
    """
    if data is not None:
        return _with(config, data=data)
    places = _places(config, run)
    if config.data.path != SYNTHETIC:
        paths = (place / config.data.path for place in places)
        path = next((path for path in paths if path.exists()), None)
        same = path is None or path == Path(config.data.path).absolute()
        return config if same else _with(config, data=str(path))
    folders = [Path(os.path.abspath(run)).parent, *(place / config.runs for place in places)]
    name = f"{SYNTHETIC}-{config.model.vocab_size}"
    runs = next((folder for folder in folders if (folder / name).exists()), None)
    same = runs is None or runs == Path(config.runs).absolute()
    return config if same else config.model_copy(update={"runs": str(runs)})


def places_tried(config: Config, run: Path) -> str:
    """Where `locate_data` looks for a relative `data.path`, for messages; empty for an absolute one."""
    if config.data.path == SYNTHETIC or Path(config.data.path).is_absolute():
        return ""
    return ", ".join(dict.fromkeys(str(place) for place in _places(config, run)))


def overrides_of(run: Path) -> list[str]:
    """The overrides that give a run's own config its directory, and its data from any working directory.

    Raises ConfigError for a directory whose name no run may have.
    """
    if not re.fullmatch(RUN_NAME, run.name):
        raise ConfigError(f"{run}: a run directory has the run's name, of letters, digits and . + - _; rename it")
    data = locate_data(load_run_config(run), run).data.path
    return [f"--runs={run.parent}", f"--name={run.name}", f"--data.path={data}"]


def _places(config: Config, run: Path) -> list[Path]:
    """Where the run was started, most likely first."""
    absolute = Path(os.path.abspath(run))
    tail = (*Path(config.runs).parts, config.name)
    by_place = [] if Path(config.runs).is_absolute() or ".." in tail or absolute.parts[-len(tail) :] != tail else [tail]
    places = [Path(*absolute.parts[: -len(tail)]) for tail in by_place]
    with suppress(OSError, UnicodeDecodeError):
        places.append(Path((run / FILE).read_text("utf-8").strip()))
    return [place for place in (*places, Path.cwd()) if place.is_absolute()]


def _with(config: Config, data: str) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"path": data})})
