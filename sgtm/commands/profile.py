"""`sgtm profile`."""

from __future__ import annotations

from pathlib import Path

from sgtm.commands.options import COUNT, Subcommands


def add(commands: Subcommands) -> None:
    about = "show where the time of a training step goes, by kernel and by module"
    parser = commands.add_configured("profile", run, about)
    parser.description = (
        "Profiles training steps: time by kernel (ops, on a CPU) and by part of the step, and a trace. Takes the "
        "config's data where they are prepared, else random tokens, as many of retain data as of each domain, labelled "
        "and mixed as in the config."
    )
    parser.add_argument("--steps", type=COUNT, default=3, metavar="N", help="profiled steps (default: 3)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: <runs>/<name>-profile)")
    parser.add_argument("--kernel", metavar="NAME", help="print the Nsight Compute command for this kernel")
    parser.add_argument("--no-trace", action="store_true", help="take the steps only, for another profiler")


def run(options) -> None:
    from sgtm.config import load_config

    config = load_config(options.config, options.overrides)

    from sgtm.measure.profile import run_profile

    command = [options.config, *options.overrides]
    trace = not options.no_trace
    run_profile(config, steps=options.steps, out=options.out, kernel=options.kernel, command=command, trace=trace)
