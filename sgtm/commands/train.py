"""`sgtm train`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap

from sgtm.commands.options import MEANING, SOURCE, Subcommands

MARGIN = " " * 6


def add(commands: Subcommands) -> None:
    about = "train a model, or resume a run: sgtm train RUN --resume"
    parser = commands.add_configured(
        "train", run, about, f"{SOURCE}|RUN", f"{MEANING}, or with --resume a run directory"
    )
    resume = "resume from the newest valid checkpoint, on any ranks and in any ZeRO stage (--resume auto is the same)"
    parser.add_argument("--resume", action="store_true", help=resume)
    parser.add_argument("--overwrite", action="store_true", help="delete the run directory if it exists")
    parser.format_help = _with_keys(parser.format_help)  # type: ignore[method-assign]  # of this command alone


def run(options) -> None:
    from sgtm.config import ConfigError, load_config, preset_names
    from sgtm.config.load import load_run_config
    from sgtm.process.ranks import rank_and_size
    from sgtm.run.located import overrides_of

    if options.resume and options.overwrite:
        raise ValueError("--resume continues a run and --overwrite deletes it; give one of them")
    overrides, folder = options.overrides, Path(options.config)
    no_such = options.resume and not folder.exists() and folder.suffix not in (".yaml", ".yml")
    if no_such and ("/" in options.config or Path("runs", options.config).is_dir()):
        load_run_config(folder)  # it names the runs that there are
    of_runs = Path("runs", folder)
    if not folder.exists() and options.config not in preset_names() and (of_runs / "config.yaml").is_file():
        raise ValueError(f"no preset or file {folder}; {of_runs} is a run directory: sgtm train {of_runs} --resume")
    if folder.is_dir() and options.config not in preset_names():
        load_run_config(folder)
        if not options.resume:
            raise ValueError(f"{folder} is a run directory; resume it: sgtm train {folder} --resume")
        options.config = folder / "config.yaml"
        overrides = [*overrides_of(folder), *overrides]  # it may have been moved
    try:
        config = load_config(options.config, overrides)
    except ConfigError as error:
        if options.resume and folder.is_file() and folder.suffix not in (".yaml", ".yml"):
            problem = str(error).splitlines()[0]
            message = f"{folder} is a file, neither a run directory nor a config ({problem}); put the run back there"
            raise ConfigError(message) from None
        raise

    # Errors that need nothing heavy; an environment that makes no sense is refused where the ranks meet.
    ranks = rank_and_size()[1]
    if ranks.isdigit() and int(ranks) > 0:
        from sgtm.estimate.stages import check_divides

        check_divides(config, int(ranks))
    if ranks == "1":
        from sgtm.data.store import read_manifest
        from sgtm.run.usable import check_usable

        check_usable(Path(config.runs) / config.name, options.resume, options.overwrite)
        if config.steering.direction is not None:
            from sgtm.model.direction import direction_of

            direction_of(config)
        if config.data.path != "synthetic":
            hint = "; if the data have moved, give their folder with --data.path DIR" if options.resume else ""
            try:
                read_manifest(Path(config.data.path))
            except ValueError as error:
                raise ValueError(f"{error}{hint}") from None

    from sgtm.training.loop import train

    trained = train(config, resume=options.resume, overwrite=options.overwrite)
    if rank_and_size()[0] == "0":
        print(f"next: sgtm eval {trained}")


def _with_keys(format_help: Callable[[], str]) -> Callable[[], str]:
    """`sgtm train --help` ends with every key of the configuration and its meaning, in the words of docs/config.md."""

    def text() -> str:
        from sgtm.config.reference import keys
        from sgtm.config.schema import Config

        lines = []
        for key in keys(Config):
            lines.append(f"  --{key.name}  {key.takes}" + (f" [{key.default}]" if key.default else ""))
            width = max(40, get_terminal_size().columns - 2)
            lines += wrap(key.doc, width, initial_indent=MARGIN, subsequent_indent=MARGIN, break_on_hyphens=False)
        return "\n".join(
            [format_help(), "keys, what they take [default], and what they mean (also docs/config.md):", *lines, ""]
        )

    return text
