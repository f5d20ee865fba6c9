"""`sgtm launch`."""

from __future__ import annotations

import sys
from pathlib import Path

from sgtm.commands.estimate import named_config
from sgtm.commands.options import AMOUNT, COUNT, Subcommands


def add(commands: Subcommands) -> None:
    about = "start a run on many ranks, or print the command"
    parser = commands.add_configured("launch", run, about, nargs="?")
    parser.description = (
        "Checks that a run divides and fits, prints its arithmetic, the estimated memory of a rank and the command, "
        "and runs that: a script of launch/ (launch/README.md: which one when)."
    )
    parser.add_argument("--preset", metavar="NAME", help="the same as PRESET")
    parser.add_argument("--dry-run", action="store_true", help="print everything, start nothing")
    parser.add_argument(
        "--launcher",
        choices=("local", "torchrun", "deepspeed", "slurm"),
        help="default: local; torchrun with --rendezvous or several nodes, deepspeed with --hostfile",
    )
    parser.add_argument("--nodes", type=COUNT, metavar="N", help="number of nodes (default: 1, or the hostfile's)")
    parser.add_argument("--gpus", type=COUNT, metavar="N", help="processes of each node (default: its GPUs, or 1)")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="torchrun: one of the nodes, the same on all")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="deepspeed: nodes and slots")
    parser.add_argument("--memory", type=AMOUNT, metavar="GB", help="of a device (default: as found here)")
    parser.add_argument("--resume", action="store_true", help="continue from the run's newest checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="delete the run directory if it exists")


def run(options) -> None:
    from sgtm.config import load_config, preset_names
    from sgtm.config.load import load_run_config
    from sgtm.run.usable import check_usable

    if options.resume and options.overwrite:
        raise ValueError("--resume continues a run and --overwrite deletes it; give one of them")
    source = named_config(options)
    if is_run := Path(source).is_dir() and source not in preset_names():
        load_run_config(Path(source))  # its message on an empty config
    config = load_config(Path(source) / "config.yaml" if is_run else source, options.overrides)
    folder = Path(source) if is_run else Path(config.runs) / config.name
    try:
        check_usable(folder, options.resume, options.overwrite)
    except ValueError as error:
        if not options.dry_run:
            raise
        print(f"warning: {error}", file=sys.stderr)

    from sgtm.estimate.launch import Where, launch

    flags = [f"--{name}" for name in ("resume", "overwrite") if getattr(options, name)]
    where = Where(options.launcher, options.nodes, options.gpus, options.rendezvous, options.hostfile)
    launch(config, where, [source, *options.overrides, *flags], options.memory, options.dry_run)
