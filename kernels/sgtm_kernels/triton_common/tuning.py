"""Which configuration (block sizes, warps, stages) a kernel is launched in.

Each choice is a `Tunable`: a heuristic, and for some keys a few other candidates. A key is what the best configuration
hangs on, in buckets: dtype, column count or head width as a power of two. Never whether tokens are masked where the
kernel's own result must not depend on that (dX of attention, the activation).

`python -m sgtm_kernels.tools.tune` times the candidates on a GPU and writes a table, tuned/<device>.json. A process
reads the table of its device once, before its first launch; without one, or without an entry, the heuristic holds.
Nothing is ever timed during training. What a table names must be among the candidates, all of which the ahead-of-time
suite compiles: other entries are ignored, with a warning. SGTM_TUNED=PATH takes another table, SGTM_TUNED=off none.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch

TUNED = Path(__file__).parents[1] / "tuned"
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

Key = tuple[str | int, ...]
Choice = tuple[str, Key]  # name of a tunable, key
Config = TypeVar("Config", bound=NamedTuple)

log = logging.getLogger("sgtm_kernels")


@dataclass(frozen=True, eq=False)
class Tunable(Generic[Config]):
    """One choice. A configuration is a NamedTuple, of one type for all keys.

    heuristic  key -> configuration where nothing has been measured
    others     candidates besides it, by key; a key that is not there has none
    """

    name: str
    heuristic: Callable[..., Config]
    others: dict[Key, tuple[Config, ...]]

    def candidates(self, *key: str | int) -> tuple[Config, ...]:
        """All configurations that may be chosen for this key, the heuristic first."""
        return (self.heuristic(*key), *(other for other in self.others.get(key, ()) if other != self.heuristic(*key)))

    def __call__(self, device: torch.device, *key: str | int) -> Config:
        """The configuration for this key on this device. Raises ValueError for a table that cannot be read."""
        if _trial is not None:
            return _trial.choose(self, key)
        table = table_of(device)
        return self.heuristic(*key) if table is None else table.choose(self, key)


class Table:
    """A file of configurations: {"device": ..., "entries": {tunable: {key: {"config": {...}, ...}}}}."""

    def __init__(self, path: Path):
        self.path = path
        self._chosen: dict[Choice, Any] = {}  # each of its tunable's own type
        try:
            content = json.loads(path.read_text("utf-8"))
            self.device: str = content["device"]
            self.entries: dict[tuple[str, str], Any] = {
                (name, key): entry["config"] for name, rows in content["entries"].items() for key, entry in rows.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"no table of kernel configurations: {path} ({type(error).__name__}: {error}); write one with "
                f"`python -m sgtm_kernels.tools.tune`, or set SGTM_TUNED=off"
            ) from None

    def choose(self, tunable: Tunable[Config], key: Key) -> Config:
        choice = (tunable.name, key)
        if choice not in self._chosen:
            self._chosen[choice] = self._named(tunable, key)
        return self._chosen[choice]

    def _named(self, tunable: Tunable[Config], key: Key) -> Config:
        """The candidate that the table names for this key; the heuristic, and a warning, where it names none."""
        candidates = tunable.candidates(*key)
        entry = self.entries.get((tunable.name, written(key)))
        if entry is None:
            return candidates[0]
        chosen = next((candidate for candidate in candidates if candidate._asdict() == entry), None)
        if chosen is None:
            log.warning(
                "%s: %s %s is none of this version's candidates of %s (%s); its heuristic is used",
                self.path, tunable.name, entry, written(key), "; ".join(map(str, candidates)),
            )  # fmt: skip
            return candidates[0]
        return chosen


@cache
def table_of(device: torch.device) -> Table | None:
    """The table that holds for a device in this process, or None where heuristics do; read once.

    Raises ValueError where SGTM_TUNED names a file that is missing, or where a table is damaged.
    """
    chosen = os.environ.get("SGTM_TUNED")
    if chosen:
        return None if chosen == "off" else Table(Path(chosen))
    path = path_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return Table(path) if path is not None and path.exists() else None


def path_of(device_name: str) -> Path:
    """Where the table of this device is looked for."""
    return TUNED / (re.sub(r"[^a-z0-9.]+", "-", device_name.lower()).strip("-") + ".json")


def written(key: Key) -> str:
    """A key as tables have it."""
    return " ".join(map(str, key))


def bucket(count: int, least: int, most: int) -> int:
    """The next power of two, within `least` and `most`, powers of two themselves."""
    return min(max(1 << (count - 1).bit_length(), least), most)


class Trial:
    """What the tuner puts in a table's place: what is asked for, and what it answers, a candidate of the choice."""

    def __init__(self, forced: dict[Choice, Any]):  # each of its tunable's own type
        self.forced = forced
        self.tunables: dict[Choice, Tunable] = {}

    def choose(self, tunable: Tunable[Config], key: Key) -> Config:
        self.tunables.setdefault((tunable.name, key), tunable)
        return self.forced.get((tunable.name, key)) or tunable.heuristic(*key)


_trial: Trial | None = None  # of the process, not of a thread: autograd has threads of its own


@contextmanager
def trial(forced: dict[Choice, Any] | None = None) -> Iterator[Trial]:
    """Kernels launched inside take these configurations, elsewhere heuristics; no table is looked at."""
    global _trial
    before, _trial = _trial, Trial(forced or {})
    try:
        yield _trial
    finally:
        _trial = before
