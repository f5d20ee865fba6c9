"""The options of `sgtm plan`, and what it calls; nothing heavy is imported before that."""

from __future__ import annotations

import argparse
from collections.abc import Callable

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
    plan.add_argument("--offload", action="store_true", help="the optimizer in the memory of the host (ZeRO 1 to 3)")
    plan.add_argument("--json", action="store_true", help="as JSON, in bytes and seconds")


def run_plan(options) -> None:
    from sgtm.config import load_config

    config = load_config(_source(options), options.overrides)

    from sgtm.plan.rows import as_json, plan
    from sgtm.plan.speed import Machine
    from sgtm.plan.terminal import print_plan

    given = {name: getattr(options, name) for name in MACHINE}
    machine = Machine(**{name: value for name, value in given.items() if value is not None})
    rows = plan(config, machine, options.offload)
    if options.json:
        print(as_json(config, machine, rows))
    else:
        print_plan(config, machine, rows)


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
