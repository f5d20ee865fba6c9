"""From a preset or a YAML file and the command line to a checked `Config`.

One rule: defaults < YAML < command line. Everything is merged as plain mappings and checked once, at the end, so that a
file may leave open what the command line gives, and a rule across keys sees the final values.

Keys on the command line are parsed here and not by a library, which would start from a finished default object, that
is after validation: overrides are dotted keys whose values are YAML, as in a file. This covers unions and mappings such
as `--data.channel.retain.unlabeled 0.75` without a syntax of their own.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from sgtm.config.errors import ConfigError, explain_errors
from sgtm.config.reference import field_at, section
from sgtm.config.schema import Config
from sgtm.config.sections import MaskingConfig
from sgtm.files import write_atomically
from sgtm.masking import recipes
from sgtm.process.names import did_you_mean

QUOTES = "; a list or mapping is one argument, in quotes: --masking.domains '[bio, chem]'"
YAML_REMEDIES = {
    "mapping values are not allowed here": "put a text that has a colon and a space in quotes",
    "found character '\\t' that cannot start any token": "indent with spaces",
    "but found another document": "write one document, without a second `---`",
}
"""By the words of the YAML library."""
PRESET_FOLDER = Path(__file__).parent / "presets"
Pairs = list[tuple[tuple[str, ...], Any]]
"""Values by path, in the order in which they are set."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `off`, `no`, `on` and `1:30` are words, `1e-3` is a number; a key given twice is an error."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        for i, (key, _) in enumerate(node.value):
            if key.value in names[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":int", ":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|false|True|False)$"), list("tfTF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile("[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))


def load_config(source: str | os.PathLike, overrides: list[str] | None = None) -> Config:
    """The config of a preset name or YAML file with overrides as on the command line (`["--model.layers", "4"]`).

    Raises ConfigError that names the file or key, what was found and what would be right; one line for each problem.
    """
    changes = parse_overrides(overrides or [])
    merged = ["the command line"] if changes else []
    return _checked(str(source), [list(changes.items())], merged, str(source), set(changes))


def load_variant(source: str | os.PathLike, layers: list[dict[str, Any]], origin: str) -> Config:
    """The config of a preset name or YAML file with keys above it (see `key_paths`), the last layer on top.

    origin  where the keys are written, which errors name. Raises ConfigError as `load_config`.
    """
    return _checked(str(source), [key_paths(keys) for keys in layers], [], origin, set())


def key_paths(keys: dict[str, Any]) -> Pairs:
    """(path, value) of each key: dotted as on the command line, or a section that is a mapping of its keys."""
    pairs: Pairs = []
    for name, value in keys.items():
        field = Config.model_fields.get(str(name))
        if field is not None and section(field) and isinstance(value, dict):
            pairs += [(_path(f"{name}.{key}"), item) for key, item in value.items()]
        else:
            pairs.append((_path(str(name)), value))
    return pairs


def _checked(source: str, layers: list[Pairs], merged: list[str], origin: str, shown: set) -> Config:
    """`source` with the layers above it; `origin`, `merged` and `shown` (paths of the command line) are for messages.

    What a recipe or strategy in a layer replaces: `_give_way`.
    """
    values, extended = _read(_locate(source))
    for layer in layers:
        values = _give_way(values, dict(layer).get(("recipe",)), dict(layer).get(("masking", "strategy")))
        _spell_out_channel(values, dict(layer))
        for path, value in layer:
            _set(values, path, value, "--" if path in shown else "", origin)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        sources = " + ".join([origin, *extended, *merged])
        raise ConfigError(explain_errors(error, Config, values, origin, shown, sources)) from None


def _spell_out_channel(values: dict, layer: dict[tuple[str, ...], Any]) -> None:
    """Write a recipe's label channel into the values where the layer above changes an entry of it."""
    name = layer.get(("recipe",), values.get("recipe"))
    inside = any(path[:2] == ("data", "channel") and len(path) > 2 for path in layer)
    if inside and name in recipes.NAMES and isinstance(values.setdefault("data", {}), dict):
        masking = values.get("masking")
        below = masking if isinstance(masking, dict) else {}
        domains = layer.get(("masking", "domains"), below.get("domains", MaskingConfig().domains))
        unmasked = layer.get(("masking", "strategy"), below.get("strategy")) == "none"
        if isinstance(domains, list):
            values["data"].setdefault("channel", recipes.recipe(name, domains, unmasked)["data"]["channel"])


def load_run_config(run: Path) -> Config:
    """The config of a run directory. Raises ConfigError for a folder that is none, naming those in it or beside it, and
    for an empty config, naming the checkpoint that has it too.
    """
    file = run / "config.yaml"
    if not file.is_file():
        inside = next(filter(_is_run, run.parents), None)
        if inside and run.exists() and not _runs_in(run):
            raise ConfigError(f"{run} is inside the run directory {inside}; give {inside}")
        runs_by_folder = (sorted(map(str, _runs_in(folder))) for folder in (run, run.parent, Path("runs")))
        known = ", ".join(next(filter(None, runs_by_folder), [])) or "none"
        raise ConfigError(f"{run}: not a run directory (no config.yaml in it); runs here: {known}")
    if not file.read_bytes().strip(b"\0 \r\n"):
        newest = max(run.glob("checkpoints/step_*/manifest.json"), default=None)
        hint = f" (its values are in {newest}, under config)" if newest else ""
        raise ConfigError(
            f"{file} is empty; put back a copy of it{hint}, or resume with what the run was made from: "
            f"sgtm train PRESET|FILE --runs {run.parent} --name {run.name} --resume"
        )
    return load_config(file)


def _is_run(folder: Path) -> bool:
    """Whether it is a run directory, and not any folder with a file of this name."""
    others = ("metrics.jsonl", "checkpoints")
    return (folder / "config.yaml").is_file() and any((folder / name).exists() for name in others)


def _runs_in(folder: Path) -> list[Path]:
    return [path.parent for path in folder.glob("*/config.yaml")]


def save_config(config: Config, path: str | os.PathLike) -> None:
    """Write every key of `config` as YAML; `load_config(path)` gives an equal config. Never leaves half a file."""
    write_atomically(Path(path), dump_config(config))


def dump_config(config: Config) -> str:
    """Every key of `config` as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def is_override(argument: str) -> bool:
    """Whether a command-line argument sets a config key: `--a.b`, or `--name` for a key at the top level."""
    name = argument[2:].partition("=")[0]
    top = {key for key, field in Config.model_fields.items() if not section(field)}
    return argument.startswith("--") and ("." in name or name in top)


def parse_overrides(arguments: list[str]) -> dict[tuple[str, ...], Any]:
    """Values by path, from `--key value` and `--key=value`, each value read as YAML.

    Raises ConfigError for an argument of another form and for a missing value.
    """
    values: dict[tuple[str, ...], Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not is_override(argument):
            raise ConfigError(f"{argument!r} is not an override; write --KEY VALUE, e.g. --train.steps 100")
        name, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest or is_override(rest[0]):
                raise ConfigError(f"--{name}: no value given; write --{name} VALUE")
            text = rest.pop(0)
        path = _path(name)
        field, inside = field_at(Config, path)
        is_text = field is not None and not inside and field.annotation is str
        values[path] = text if is_text else _parse_value(text, name)
    return values


def _parse_value(text: str, name: str) -> Any:
    try:
        return parse_yaml(text, f"--{name}")
    except ConfigError as error:
        cut = text.startswith(("[", "{")) and not text.endswith(("]", "}"))
        raise ConfigError(f"{error}{QUOTES}" if cut else str(error)) from None


def _path(name: str) -> tuple[str, ...]:
    """Where an override goes. Inside a mapping of plain values the rest is one key, dots and all."""
    path = tuple(name.split("."))
    field, inside = field_at(Config, path)
    if field is None or len(inside) < 2:
        return path
    start = len(path) - len(inside)
    of_mappings = get_origin(field.annotation) is dict and get_origin(get_args(field.annotation)[1]) is dict
    if of_mappings:
        return (*path[: start + 1], ".".join(inside[1:]))
    return (*path[:start], ".".join(inside))


def _set(values: dict, path: tuple[str, ...], value: Any, dashes: str, origin: str) -> None:
    """Set a value; `dashes` of an option of the command line, else the file `origin` is named in the error."""
    for i, name in enumerate(path[:-1]):
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            file, key = "" if dashes else f"{origin}: ", ".".join(path[: i + 1])
            whole = ".".join(path)
            raise ConfigError(f"{file}{dashes}{whole}: {key} is {values!r}, not a mapping; set {dashes}{key} instead")
    values[path[-1]] = value


def _locate(source: str, beside: Path | None = None) -> Path:
    """The file of a preset name or path; a path in a file is relative to that file."""
    looks_like_file = source.endswith((".yaml", ".yml")) or "/" in source or os.sep in source
    path = (beside or Path()) / source if looks_like_file else PRESET_FOLDER / f"{source}.yaml"
    if path.is_file():
        return path
    for run in (path, Path("runs") / source):
        if _is_run(run):
            raise ConfigError(f"{run} is a run directory; its config is {run}/config.yaml")
    presets = preset_names()
    if looks_like_file:
        slip = did_you_mean(path.name, _yaml_files(path.parent))
        raise ConfigError(f"{path}: no such file{slip}; give a YAML file or one of the presets: {', '.join(presets)}")
    slip = did_you_mean(source, [*presets, *_yaml_files(beside or Path())])
    example = "" if ".yaml" in slip else f", e.g. ./{source}.yaml"
    raise ConfigError(
        f"unknown preset {source!r}{slip}; presets: {', '.join(presets)}; a file is named by its path{example}"
    )


def _yaml_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.y*ml") if path.suffix in (".yaml", ".yml"))


def _read(path: Path, chain: tuple[Path, ...] = ()) -> tuple[dict, list[str]]:
    """The mapping of a file, with what it extends merged below it, and the names of that."""
    if path.resolve() in chain:
        raise ConfigError(f"{path}: extends leads back to itself: {' -> '.join(p.name for p in (*chain, path))}")
    try:
        values = parse_yaml(path.read_text("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}, not a mapping of keys such as `model:` and `train:`")
    if "base" in values and {"variants", "grid"} & values.keys():
        raise ConfigError(f"{path} is a sweep file; train its runs with: sgtm sweep {path}")
    base = values.pop("extends", None)
    if base is None:
        return values, []
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: {base!r} must be a preset name or the path of a YAML file")
    try:
        file = _locate(base, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: extends: {error}") from None
    below, extended = _read(file, (*chain, path.resolve()))
    return _merge(below, values), [base, *extended]


def _merge(below: dict, above: dict) -> dict:
    """Sections are merged key by key; a value, a list or a mapping of data replaces what was there.

    What a recipe or strategy above replaces: `_give_way`.
    """
    masking = above.get("masking")
    below = _give_way(below, above.get("recipe"), masking.get("strategy") if isinstance(masking, dict) else None)
    merged = dict(below)
    for name, value in above.items():
        field = Config.model_fields.get(name)
        both = isinstance(value, dict) and isinstance(below.get(name), dict)
        merged[name] = {**below[name], **value} if field and section(field) and both else value
    return merged


def _give_way(values: dict, recipe: Any, strategy: Any) -> dict:
    """The values without what a recipe or strategy in the layer above replaces.

    A recipe replaces every key that recipes set. Strategy none replaces those of `masking`: the unmasked baseline
    of a config has no joint, embedding or certificate left.
    """
    if recipe is not None:
        replaced = recipes.KEYS
        values = {name: value for name, value in values.items() if name != "recipe"}
    else:
        replaced = {"masking": recipes.KEYS["masking"]} if strategy == "none" else {}
    return values | {
        name: {key: value for key, value in values[name].items() if key not in keys}
        for name, keys in replaced.items()
        if isinstance(values.get(name), dict)
    }


def parse_yaml(text: str, where: str) -> Any:
    """The content of YAML 1.2. Raises ConfigError that begins with `where` and names line and column."""
    try:
        content = yaml.load(text, _Loader)
        json.dumps(content, default=str, skipkeys=True)  # refuses a mapping that an anchor puts into itself
        return content
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}, column {mark.column + 1}:" if mark and "\n" in text else ""
        problem = getattr(error, "problem", None) or str(error)
        remedy = f"; {YAML_REMEDIES[problem]}" if problem in YAML_REMEDIES else ""
        problem = problem.removeprefix("but ")  # its first half, `expected a single document`, is in `context`
        raise ConfigError(f"{where}:{line} not valid YAML: {problem}{remedy}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply") from None
    except ValueError as error:  # a number of too many digits, a date there is not, a circle
        raise ConfigError(f"{where}: cannot be read: {error}") from None
