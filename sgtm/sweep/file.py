"""The sweep file: a base config, variants or a grid of it, seeds; expanded to named runs (docs/sweep.md)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, ValidationError

from sgtm.config.errors import ConfigError, explain_errors
from sgtm.config.load import key_paths, load_variant, parse_yaml
from sgtm.config.schema import Config, Section
from sgtm.process.names import nearest

NAME = re.compile(r"\w[\w.+-]*")
SIGNS = "letters, digits and any of . + - _, the first not . + or -"
LONGEST_NAME = 200
"""Characters of a run's name, as file systems take 255 bytes."""
Aspect = Literal["tokens", "data", "evaluation"]


class SweepFile(Section):
    """Keys of the file."""

    name: str | None = None
    """Default: the file's name without `.yaml`."""
    runs: str | None = None
    """Folder that holds the sweep's folder; default: the base's `runs`."""
    base: str
    """Preset, or YAML file relative to this one."""
    set: dict[str, Any] = {}
    """Keys above the base, for every run."""
    variants: dict[str, dict[str, Any] | None] = {}
    """Keys of each variant by its name."""
    grid: dict[str, list[Any] | dict[str, Any]] = {}
    """Values of each key: a list, or a mapping of names to values. All combinations are trained."""
    seeds: list[NonNegativeInt] | None = None
    """Default: the one that each run's keys give."""
    more_seeds: dict[str, list[NonNegativeInt]] = {}
    """Further seeds of these variants, behind `seeds`."""
    seed_keys: list[Literal["train.seed", "data.seed"]] = ["train.seed"]
    """Keys that a seed sets."""
    adjacent: list[str] = []
    """Categories close to a domain, not of one: their loss has columns of its own and does not count as retained."""
    may_differ: list[Aspect] | dict[str, list[Aspect]] = {}
    """What may differ on purpose: in all variants, or in those named."""


@dataclass(frozen=True)
class Run:
    """One training run of a sweep."""

    variant: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def directory(self) -> Path:
        return Path(self.config.runs) / self.config.name


@dataclass(frozen=True)
class Sweep:
    """
    folder      `<runs>/<name>`, which holds the run directories
    runs        all seeds of one variant are not neighbours: the first seed of every variant comes first
    may_differ  by variant, what may differ from the others on purpose
    adjacent    categories whose loss is shown apart from the retained ones
    """

    file: Path
    folder: Path
    runs: tuple[Run, ...]
    may_differ: dict[str, frozenset[str]]
    adjacent: tuple[str, ...] = ()

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(run.variant for run in self.runs))


def read_sweep(file: Path) -> Sweep:
    """The runs that a file describes. Raises ConfigError naming the file, the variant and the key of a mistake."""
    spec = _read(file)
    base = str(file.parent / spec.base) if _is_file(spec.base) else spec.base
    if _is_file(spec.base) and not Path(base).is_file():
        raise ConfigError(f"{file}: base: no such file: {spec.base}; relative to the sweep file that is {base}")
    common = load_variant(base, [_allowed(spec.set, f"{file}: set", spec)], f"{file}: set")
    name = spec.name or file.stem
    if not NAME.fullmatch(name):
        raise ConfigError(f"{file}: name: {name!r} must be of {SIGNS}")
    folder = Path(spec.runs or common.runs) / name
    if (folder / "config.yaml").exists():
        raise ConfigError(f"{file}: name: {folder} is a run directory; give the sweep another name")
    points = dict(_points(file, spec))
    runs = []
    for seed, variant in _seeds(file, spec, list(points)):
        layers, where = [spec.set, points[variant]], f"{file}: variant {variant}"
        if seed is None:
            seed = load_variant(base, layers, where).train.seed
        else:
            layers.append(dict.fromkeys(spec.seed_keys, seed))
        own = {"name": f"{variant}-s{seed}", "runs": str(folder)}
        runs.append(Run(variant, seed, load_variant(base, [*layers, own], where)))
    return Sweep(file, folder, tuple(runs), _may_differ(file, spec, list(points)), tuple(spec.adjacent))


def _read(file: Path) -> SweepFile:
    try:
        values = parse_yaml(file.read_text("utf-8"), str(file))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; docs/sweep.md has the format") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{file}: not a mapping of keys such as `base:` and `variants:`; docs/sweep.md has the format"
        )
    if "base" not in values and ("extends" in values or "model" in values):
        raise ConfigError(f"{file} is a config, not a sweep file; train it with: sgtm train {file}")
    try:
        return SweepFile.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain_errors(error, SweepFile, values, str(file), set())) from None


def _is_file(source: str) -> bool:
    return "/" in source or source.endswith((".yaml", ".yml"))


def _points(file: Path, spec: SweepFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and keys of each variant: the named ones times the grid. Raises ConfigError for names that clash."""
    if not spec.variants and not spec.grid:
        raise ConfigError(f"{file}: neither variants nor a grid; give one of them")
    axes = [_axis(file, key, values, spec) for key, values in spec.grid.items()]
    seen: set[str] = set()
    for (label, keys), *cell in product(spec.variants.items() or [("", {})], *axes):
        keys = _allowed(keys or {}, f"{file}: variant {label}", spec)
        if twice := _dotted(keys) & _dotted(spec.grid):
            raise ConfigError(f"{file}: variant {label} and the grid both set {', '.join(sorted(twice))}")
        name = "+".join(filter(None, [label, *(word for word, _ in cell)]))
        if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
            raise ConfigError(f"{file}: variant {name!r}: names are of {SIGNS}, at most {LONGEST_NAME} of them")
        if name in seen:
            raise ConfigError(f"{file}: two variants are named {name}; name the values of the grid: {{NAME: VALUE}}")
        seen.add(name)
        yield name, keys | {key: value for _, (key, value) in cell}


def _axis(file: Path, key: str, values: list | dict, spec: SweepFile) -> list[tuple[str, tuple[str, Any]]]:
    """(word of the name, (key, value)) of each value on one axis of the grid."""
    _allowed({key: None}, f"{file}: grid", spec)
    if not values:
        raise ConfigError(f"{file}: grid: {key}: no values")
    if isinstance(values, dict):
        return [(name, (key, value)) for name, value in values.items()]
    leaf = key.rpartition(".")[2]
    short = leaf if [other.rpartition(".")[2] for other in spec.grid].count(leaf) == 1 else key
    entries = []
    for value in values:
        if isinstance(value, list | dict):
            raise ConfigError(f"{file}: grid: {key}: {value} needs a name: {key}: {{NAME: VALUE, ...}}")
        entries.append((f"{short}-{_word(value)}", (key, value)))
    return entries


def _word(value: Any) -> str:
    """A scalar in a name: `0.001`, `masked`, `true`, `none`."""
    text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")


def _seeds(file: Path, spec: SweepFile, variants: list[str]) -> list[tuple[int | None, str]]:
    """Seed and variant of each run; None for the seed that the variant's own keys give."""
    if spec.seeds is None:
        if spec.more_seeds:
            raise ConfigError(f"{file}: more_seeds: without `seeds`; give the seeds of every variant too")
        return [(None, variant) for variant in variants]
    _check_variants(file, "more_seeds", spec.more_seeds, variants)
    if not spec.seeds or len(set(spec.seeds)) < len(spec.seeds):
        raise ConfigError(f"{file}: seeds: {spec.seeds} must be one or more different numbers")
    for variant, more in spec.more_seeds.items():
        if len({*spec.seeds, *more}) < len(spec.seeds) + len(more):
            raise ConfigError(f"{file}: more_seeds: {variant}: {more} must be different numbers that `seeds` lacks")
    more_seeds = [(seed, variant) for variant, more in spec.more_seeds.items() for seed in more]
    return [*product(spec.seeds, variants), *more_seeds]


def _allowed(keys: dict[str, Any], where: str, spec: SweepFile) -> dict[str, Any]:
    """`keys`. Raises ConfigError for one that the sweep sets itself."""
    taken = {"name": "the sweep names its runs", "runs": "it is a key of the sweep file itself"}
    taken |= dict.fromkeys(spec.seed_keys if spec.seeds is not None else [], "`seeds` sets it")
    for key in sorted(_dotted(keys) & taken.keys()):
        raise ConfigError(f"{where}: {key}: {taken[key]}")
    return keys


def _dotted(keys: dict[str, Any]) -> set[str]:
    return {".".join(path) for path, _ in key_paths(keys)}


def _may_differ(file: Path, spec: SweepFile, variants: list[str]) -> dict[str, frozenset[str]]:
    if isinstance(spec.may_differ, list):
        return dict.fromkeys(variants, frozenset(spec.may_differ))
    _check_variants(file, "may_differ", spec.may_differ, variants)
    return {name: frozenset(spec.may_differ.get(name, ())) for name in variants}


def _check_variants(file: Path, key: str, names: Iterable[str], variants: list[str]) -> None:
    """Raises ConfigError for a name of `key` that is no variant's."""
    for name in names:
        if name not in variants:
            close = nearest(name, variants)
            hint = f"did you mean {close}?" if close else f"variants: {', '.join(variants)}"
            raise ConfigError(f"{file}: {key}: {name}: no such variant; {hint}")
