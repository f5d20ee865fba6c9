"""The options of `sgtm plan` and `sgtm launch`, and what they call; nothing heavy is imported before that."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

MACHINE = ("nodes", "gpus", "memory", "tflops", "inside", "between", "reached", "sustained")


def add_plan_options(plan) -> None:
    plan.description = (
        "Estimates, from the config alone, the memory of a rank, the bytes that a step moves and its speed, for every "
        "ZeRO stage. Defaults are an H100 SXM in a DGX H100 by NVIDIA's data sheets; the shares are assumptions."
    )
    plan.add_argument("--preset", metavar="NAME", help="the same as PRESET")
    plan.add_argument("--nodes", type=COUNT, default=1, metavar="N", help="number of nodes (default: 1)")
    plan.add_argument("--gpus", type=COUNT, default=1, metavar="N", help="GPUs of each node (default: 1)")
    plan.add_argument("--memory", type=AMOUNT, metavar="GB", help="of a GPU (default: 80)")
    plan.add_argument("--tflops", type=AMOUNT, help="peak of a GPU, dense (default: 989.4 in bf16, 67 in fp32)")
    plan.add_argument("--inside", type=AMOUNT, metavar="GB/s", help="of a GPU to its node, one way (default: 450)")
    plan.add_argument("--between", type=AMOUNT, metavar="GB/s", help="of a node to others, one way (default: 400)")
    plan.add_argument("--reached", type=AMOUNT, metavar="SHARE", help="of the peak, computing (default: 0.5)")
    plan.add_argument("--sustained", type=AMOUNT, metavar="SHARE", help="of the bandwidths (default: 0.8)")
    plan.add_argument("--json", action="store_true", help="as JSON, in bytes and seconds")


def add_launch_options(launch) -> None:
    launch.description = (
        "Checks that a run divides and fits, prints its arithmetic, the estimated memory of a rank and the command, "
        "and runs that: a script of launch/ (launch/README.md says which one when)."
    )
    launch.add_argument("--preset", metavar="NAME", help="the same as PRESET")
    launch.add_argument("--dry-run", action="store_true", help="print everything, start nothing")
    launch.add_argument(
        "--launcher",
        choices=("local", "torchrun", "deepspeed", "slurm"),
        help="default: local; torchrun with --rendezvous or several nodes, deepspeed with --hostfile",
    )
    launch.add_argument("--nodes", type=COUNT, metavar="N", help="number of nodes (default: 1, or the hostfile's)")
    launch.add_argument("--gpus", type=COUNT, metavar="N", help="processes of each node (default: its GPUs, or 1)")
    launch.add_argument("--rendezvous", metavar="HOST:PORT", help="torchrun: one of the nodes, the same on all")
    launch.add_argument("--hostfile", type=Path, metavar="FILE", help="deepspeed: nodes and slots")
    launch.add_argument("--memory", type=AMOUNT, metavar="GB", help="of a device (default: as found here)")
    launch.add_argument("--resume", action="store_true", help="continue from the run's newest checkpoint")
    launch.add_argument("--overwrite", action="store_true", help="delete the run directory if it exists")


def run_plan(options) -> None:
    from sgtm.config import load_config

    config = load_config(_source(options), options.overrides)

    from sgtm.plan.rows import as_json, plan
    from sgtm.plan.speed import Machine
    from sgtm.plan.terminal import print_plan

    given = {name: getattr(options, name) for name in MACHINE}
    machine = Machine(**{name: value for name, value in given.items() if value is not None})
    rows = plan(config, machine)
    if options.json:
        print(as_json(config, machine, rows))
    else:
        print_plan(config, machine, rows)


def run_launch(options) -> None:
    from sgtm.config import load_config, preset_names

    if options.resume and options.overwrite:
        raise ValueError("--resume continues a run and --overwrite deletes it; give one of them")
    source = _source(options)
    is_run = Path(source).is_dir() and source not in preset_names()
    config = load_config(Path(source) / "config.yaml" if is_run else source, options.overrides)

    from sgtm.launch import Where, launch

    flags = [f"--{name}" for name in ("resume", "overwrite") if getattr(options, name)]
    where = Where(options.launcher, options.nodes, options.gpus, options.rendezvous, options.hostfile)
    launch(config, where, [source, *options.overrides, *flags], options.memory, options.dry_run)


def _source(options) -> str:
    """The config that was named, in either way."""
    if (options.config is None) == (options.preset is None):
        raise ValueError("name one config: a preset or FILE.yaml (sgtm config lists the presets)")
    return options.config or options.preset


def _above_zero(kind: type) -> Callable[[str], float]:
    """What an option of this kind of number takes."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a {NAMES[kind]} above 0, got {text!r}")
        return value

    return number


NAMES = {int: "whole number", float: "number"}
COUNT, AMOUNT = _above_zero(int), _above_zero(float)
