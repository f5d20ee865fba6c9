"""What an argument that no command has may be a slip of."""

from __future__ import annotations

from sgtm.process.names import nearest

OPTIONS = {
    "train": ("resume", "overwrite"),
    "bench": ("rounds", "json", "peers", "tune"),
    "profile": ("steps", "out", "kernel", "no-trace"),
    "doctor": ("json", "check"),
    "estimate": ("nodes", "gpus", "memory", "tflops", "inside", "between", "reached", "sustained", "json"),
    "launch": ("launcher", "nodes", "gpus", "rendezvous", "hostfile", "memory", "resume", "overwrite", "dry-run"),
}


def what_is_meant(command: str, arguments: list[str], otherwise: str = "") -> str:
    """`; ` and the remedy, or `otherwise`, for arguments that a command does not take.

    A key of the config with one dash, without dashes or as a mapping of its section; `--steps` of `--train.steps`; a
    second preset or file.
    """
    from sgtm.config.reference import keys
    from sgtm.config.schema import Config

    first = arguments[0]
    names = [key.name for key in keys(Config)]
    key, equals, value = first.lstrip("-").partition("=")
    if key in names and first[:2] != "--" and (equals or first[:1] == "-"):
        return f"; write --{key} {value or 'VALUE'}"
    if inside := [name for name in names if first[:2] == "--" and name.startswith(f"{key}.")]:
        return f"; {key} is a section; write its keys one by one: --{inside[0]} VALUE"
    if otherwise:
        return otherwise
    if key == "preset":
        return "; write the preset without --preset"
    others = {option for options in OPTIONS.values() for option in options} - set(OPTIONS.get(command, ()))
    if first[:2] == "--" and key in others and key not in {name.rpartition(".")[2] for name in names}:
        return f"; {command} has no --{key}"
    known = {name: [f"--{name}"] for name in OPTIONS.get(command, ())}
    for name in names:
        known.setdefault(name.rpartition(".")[2], []).append(f"--{name}")
    options = [argument[2:].partition("=")[0] for argument in arguments if argument[:2] == "--"]
    meant = [option for word in options if (close := nearest(word, known)) for option in known[close]]
    if meant:
        return f"; did you mean {' or '.join(meant)}?"
    takes_one = command in ("train", "explain", "config", "bench", "profile", "estimate", "launch")
    return "" if not takes_one or first[:1] == "-" else f"; {command} takes one preset or file"
