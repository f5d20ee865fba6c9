"""The command line: `sgtm prepare | train | eval | export | report | checkpoint | explain | sweep | ...`.

Thin: every command parses its arguments, calls one function elsewhere and prints where the result is. Modules are
imported when their command runs, so `sgtm --help` and most mistakes are answered at once. A user's mistake (ValueError,
OSError) is one message on stderr and exit status 2; `SGTM_TRACEBACK=1` shows where it came from. Output that nobody
reads any more (`sgtm explain debug | head`) ends the command without a word.
"""

from __future__ import annotations

import argparse
import os
import select
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap

from sgtm.argument_meant import what_is_meant
from sgtm.printed_error import print_error
from sgtm.stopping import Stopped, stoppable

OVERRIDES = "Any key of the configuration is an option: --train.steps 100 --masking.strategy none"

SOURCE = "PRESET|FILE.yaml", "preset (see sgtm config) or file"
MEANING = {"initial_indent": " " * 6, "subsequent_indent": " " * 6, "break_on_hyphens": False}  # of a key, in --help
STOPPABLE = ("train", "quickstart", "eval", "export", "report", "checkpoint", "sweep", "profile")
RESUMED = ("prepare", "sweep")  # by the same command
CONFIGURED = ("train", "explain", "config", "quickstart", "bench", "profile", "plan", "launch", "doctor")


def main(argv: list[str] | None = None) -> int:
    """Run one command. Exit status: 0, 1 if nobody reads stdout, 2 for a mistake, 128 + a signal that ended it."""
    try:
        arguments = _without_local_rank(sys.argv[1:] if argv is None else argv)
        status = _dispatch(arguments)
        sys.stdout.flush()  # a closed pipe shows here, and not in the interpreter's own flush at exit
        return status
    except Stopped as stopped:
        # A launcher ends the other ranks when one fails, and rank 0 may have more to close; it has its own status.
        return stopped.status if _only_rank() else 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 1
        if os.environ.get("SGTM_TRACEBACK", "0") not in ("", "0"):
            raise
        print_error(error)
        return 2


def _dispatch(argv: list[str]) -> int:
    overrides: list[str] = []
    if argv and argv[0] in ("train", "launch"):
        argv = _without_auto(argv)
    if argv and argv[0] in CONFIGURED:
        argv, overrides = split_overrides(argv)
    parser = _parser()
    if not argv:
        parser.print_help()
        return 0
    if argv[0] == "prepare":
        with stoppable(_go_on(argv)):
            return _prepare(argv[1:])  # tyro makes its options from the dataclass
    options, rest = parser.parse_known_args(argv)
    if rest:
        from sgtm.config.load import QUOTES

        list_cut_up = overrides and not any(argument.startswith("-") for argument in rest)
        hint = what_is_meant(argv[0], rest, QUOTES if list_cut_up else "") if argv[0] in CONFIGURED else ""
        getattr(options, "error", parser.error)(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if hasattr(options, "config"):
        options.overrides = overrides
    # Of several ranks each ends by the signal itself: the launcher then ends the others, which may wait for it.
    with stoppable(_go_on([*argv, *overrides])) if argv[0] in STOPPABLE and _only_rank() else nullcontext():
        return options.run(options) or 0


def _go_on(argv: list[str]) -> str:
    how = "what is finished is kept; go on" if argv[0] in RESUMED else "again"
    return f"{how}: {shlex.join(['sgtm', *argv])}"


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """(arguments, overrides): `--a.b VALUE`, `--a.b=VALUE` and top-level keys of the config are overrides."""
    from sgtm.config.load import is_override

    rest, overrides, pending = [], [], False
    for argument in argv:
        if is_override(argument):
            overrides.append(argument)
            pending = "=" not in argument
        elif pending:
            overrides.append(argument)
            pending = False
        else:
            rest.append(argument)
    return rest, overrides


def _parser() -> argparse.ArgumentParser:
    from sgtm import __version__
    from sgtm.checkpoint_command import add_checkpoint_tasks, run_checkpoint
    from sgtm.eval_command import DATA, add_eval_options, run_eval
    from sgtm.plan.command import add_launch_options, add_plan_options, run_launch, run_plan
    from sgtm.quickstart_command import run_quickstart
    from sgtm.report_command import add_report_options, run_report
    from sgtm.sweep.command import add_sweep_options, run_sweep_command

    parser = argparse.ArgumentParser(
        prog="sgtm",
        description="Pretraining with Selective GradienT Masking: what labelled data teaches can be removed again.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sgtm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name, run, about, **options):
        sub = commands.add_parser(name, help=about, description=about, allow_abbrev=False, **options)
        sub.set_defaults(run=run, error=sub.error)  # with the command's own usage
        return sub

    def configured(name, run, about, nargs=None, or_run=("", "")):
        sub = command(name, run, about, epilog=OVERRIDES)
        takes, means = (f"{text}{more}" for text, more in zip(SOURCE, or_run, strict=True))
        sub.add_argument("config", nargs=nargs, metavar=takes, help=means)
        return sub

    command("prepare", None, "tokenize a corpus into shards (sgtm prepare --help for its options)", add_help=False)
    or_run = "|RUN", ", or with --resume a run directory"
    train = configured("train", _train, "train a model, or go on with a run: sgtm train RUN --resume", or_run=or_run)
    resume = "go on from the newest whole checkpoint, on any ranks and in any ZeRO stage (--resume auto is the same)"
    train.add_argument("--resume", action="store_true", help=resume)
    train.add_argument("--overwrite", action="store_true", help="delete the run directory if it exists")
    about = "losses by category, full and with every subset of domains removed"
    add_eval_options(command("eval", run_eval, about), _positive)
    export = command("export", _export, "write a Hugging Face model, with domains removed or without")
    export.add_argument("run_dir", type=Path, metavar="RUN")
    about = "domains to remove, as bio chem or bio,chem (default: none)"
    export.add_argument("--remove", nargs="+", default=[], metavar="DOMAIN", help=about)
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    export.add_argument("--data.path", dest="data_path", metavar="DIR", help=DATA)
    add_report_options(command("report", run_report, "write the HTML page and the figures of a run"))
    checkpoint = command(
        "checkpoint", run_checkpoint, "verify the checkpoints of a run, or write one for other programs"
    )
    add_checkpoint_tasks(checkpoint)
    configured("explain", _explain, "show which parameters each label updates, and how many")
    bench = configured(
        "bench", _bench, "measure what masks cost in a training step, in time and memory, on this machine"
    )
    bench.add_argument("--rounds", type=_positive, default=15, metavar="N", help="steps of each row (default: 15)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object per row")
    bench.add_argument(
        "--peers", action="store_true", help="compare with Hugging Face's model of this shape as well, unmasked"
    )
    bench.add_argument(
        "--tune",
        action="store_true",
        help="first tune the Triton kernels on this GPU at the config's shape (--kernels.backend triton); writes "
        "tuned/<device>.json beside the kernels (sgtm doctor names the folder), which later runs read; SGTM_TUNED=off "
        "undoes it",
    )
    profile = configured("profile", _profile, "show where the time of a training step goes, by kernel and by module")
    profile.description = (
        "Profiles training steps: time by kernel (ops, on a CPU) and by part of the step, and a trace. Takes the "
        "config's data where they are prepared, else random tokens, as many of retain data as of each domain, labelled "
        "and mixed as the config says."
    )
    profile.add_argument("--steps", type=_positive, default=3, metavar="N", help="profiled steps (default: 3)")
    profile.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: <runs>/<name>-profile)")
    profile.add_argument("--kernel", metavar="NAME", help="print the Nsight Compute command for this kernel")
    profile.add_argument("--no-trace", action="store_true", help="take the steps only, for another profiler")
    add_plan_options(configured("plan", run_plan, "estimate memory, traffic and speed of a run", nargs="?"))
    add_launch_options(configured("launch", run_launch, "start a run on many ranks, or say how", nargs="?"))
    add_sweep_options(command("sweep", run_sweep_command, "train many runs and compare them in one table"))
    about = "versions, devices, kernel backends, and what is missing for what"
    doctor = command("doctor", _doctor, about, epilog=f"With --check: {OVERRIDES[0].lower()}{OVERRIDES[1:]}")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    about = "also run the kernels of this config (default: quickstart) against the reference; status 1 on failure"
    doctor.add_argument("--check", dest="config", nargs="?", const="quickstart", metavar=SOURCE[0], help=about)
    config = configured("config", _config, "print a config with every key, or list the presets", nargs="?")
    config.add_argument("--markdown", action="store_true", help="print the reference of all keys instead")
    quick = command("quickstart", run_quickstart, "train, evaluate and report the quickstart preset", epilog=OVERRIDES)
    quick.set_defaults(config="quickstart")
    train.format_help = _with_keys(train.format_help)
    return parser


def _with_keys(format_help):
    """`sgtm train --help` ends with every key of the configuration and its meaning, in the words of docs/config.md."""

    def text() -> str:
        from sgtm.config.reference import keys
        from sgtm.config.schema import Config

        lines = []
        for key in keys(Config):
            lines.append(f"  --{key.name}  {key.takes}" + (f" [{key.default}]" if key.default else ""))
            lines += wrap(key.doc, max(40, get_terminal_size().columns - 2), **MEANING)
        return "\n".join(
            [format_help(), "keys, what they take [default], and what they mean (also docs/config.md):", *lines, ""]
        )

    return text


def _prepare(argv: list[str]) -> int:
    import tyro

    from sgtm.data.prepare import PrepareOptions, run_prepare

    run_prepare(tyro.cli(PrepareOptions, prog="sgtm prepare", args=argv))
    return 0


def _train(options) -> None:
    from sgtm.config import ConfigError, load_config, preset_names
    from sgtm.config.load import load_run_config
    from sgtm.config.located import overrides_of

    if options.resume and options.overwrite:
        raise ValueError("--resume continues a run and --overwrite deletes it; give one of them")
    overrides, folder = options.overrides, Path(options.config)
    no_such = options.resume and not folder.exists() and folder.suffix not in (".yaml", ".yml")
    if no_such and ("/" in options.config or Path("runs", options.config).is_dir()):
        load_run_config(folder)  # it names the runs that there are
    if folder.is_dir() and options.config not in preset_names():
        load_run_config(folder)
        if not options.resume:
            raise ValueError(f"{folder} is a run directory; go on with it: sgtm train {folder} --resume")
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

    if _only_rank():  # errors that need nothing heavy
        from sgtm.data.store import read_manifest
        from sgtm.train.usable import check_usable

        check_usable(Path(config.runs) / config.name, options.resume, options.overwrite)
        if config.data.path != "synthetic":
            read_manifest(Path(config.data.path))

    from sgtm.train.loop import train

    train(config, resume=options.resume, overwrite=options.overwrite)


def _export(options) -> None:
    from sgtm.config.load import load_run_config

    load_run_config(options.run_dir)  # before anything heavy is imported
    from sgtm.model.export import export_run

    remove = [domain for words in options.remove for domain in words.split(",") if domain]  # no name has a comma
    export_run(options.run_dir, remove, options.out, options.data_path)
    print(options.out)


def _explain(options) -> None:
    from sgtm.config import load_config

    config = load_config(options.config, options.overrides)

    from sgtm.explain import print_explanation

    print_explanation(config)


def _bench(options) -> None:
    from sgtm.config import load_config

    config = load_config(options.config, options.overrides)

    from sgtm.bench.command import bench

    bench(config, options.rounds, options.json, options.tune, options.peers)


def _profile(options) -> None:
    from sgtm.config import load_config

    config = load_config(options.config, options.overrides)

    from sgtm.profile.run import run_profile

    command = [options.config, *options.overrides]
    trace = not options.no_trace
    run_profile(config, steps=options.steps, out=options.out, kernel=options.kernel, command=command, trace=trace)


def _doctor(options) -> int:
    from sgtm.config import load_config

    if options.overrides and not options.config:
        raise ValueError(f"{options.overrides[0]} is a key of a config, which only --check takes")
    check = load_config(options.config, options.overrides) if options.config else None

    from sgtm.doctor import print_findings

    return print_findings(as_json=options.json, check=check)


def _config(options) -> None:
    from sgtm.config import Config, load_config, preset_names
    from sgtm.config.load import dump_config
    from sgtm.config.reference import markdown

    if options.markdown:
        print(markdown(Config), end="")
    elif options.config is None:
        print("\n".join(preset_names()))
    else:
        print(dump_config(load_config(options.config, options.overrides)), end="")


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return number


def _without_local_rank(argv: list[str]) -> list[str]:
    """The deepspeed launcher adds `--local_rank=N`; the environment says the same."""
    kept, skip = [], False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        if skip:
            skip = False
        elif name in ("--local_rank", "--local-rank"):
            skip = not equals
        else:
            kept.append(argument)
    return kept


def _without_auto(argv: list[str]) -> list[str]:
    """`--resume auto` is `--resume`, which takes a run in whatever state it is."""
    kept: list[str] = []
    for argument in argv:
        if argument == "--resume=auto":
            kept.append("--resume")
        elif not (argument == "auto" and kept[-1] == "--resume"):
            kept.append(argument)
    return kept


def _only_rank() -> bool:
    from sgtm.launched import rank_and_size

    return rank_and_size()[1] == "1"


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has gone, so that no other broken pipe passes for it.

    If so, what is still buffered goes nowhere, or the interpreter would fail on it at exit.
    """
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone
