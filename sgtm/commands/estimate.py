"""`sgtm estimate`."""

from __future__ import annotations

from sgtm.commands.options import AMOUNT, COUNT, SHARE, Subcommands

MACHINE = ("nodes", "gpus", "memory", "tflops", "inside", "between", "reached", "sustained")


def add(commands: Subcommands) -> None:
    about = "estimate memory, traffic and speed of a run"
    parser = commands.add_configured("estimate", run, about, nargs="?")
    parser.description = (
        "Estimates, from the config alone, the memory of a rank, the bytes that a step moves and its speed, for every "
        "ZeRO stage. Defaults are an H100 SXM in a DGX H100 by NVIDIA's data sheets; the shares are assumptions."
    )
    parser.add_argument("--preset", metavar="NAME", help="the same as PRESET")
    parser.add_argument("--nodes", type=COUNT, default=1, metavar="N", help="number of nodes (default: 1)")
    parser.add_argument("--gpus", type=COUNT, default=1, metavar="N", help="GPUs of each node (default: 1)")
    parser.add_argument("--memory", type=AMOUNT, metavar="GB", help="of a GPU (default: 80)")
    parser.add_argument("--tflops", type=AMOUNT, help="peak of a GPU, dense (default: 989.4 in bf16, 67 in fp32)")
    parser.add_argument("--inside", type=AMOUNT, metavar="GB/s", help="of a GPU to its node, one way (default: 450)")
    parser.add_argument("--between", type=AMOUNT, metavar="GB/s", help="of a node to others, one way (default: 400)")
    parser.add_argument("--reached", type=SHARE, metavar="SHARE", help="of the peak, computing (default: 0.5)")
    parser.add_argument("--sustained", type=SHARE, metavar="SHARE", help="of the bandwidths (default: 0.8)")
    parser.add_argument("--json", action="store_true", help="as JSON, in bytes and seconds")


def run(options) -> None:
    from sgtm.config import load_config

    config = load_config(named_config(options), options.overrides)

    from sgtm.estimate.speed import Machine
    from sgtm.estimate.stages import as_json, estimate
    from sgtm.estimate.terminal import print_estimate

    values = {name: getattr(options, name) for name in MACHINE}
    machine = Machine(**{name: value for name, value in values.items() if value is not None})
    rows = estimate(config, machine)
    if options.json:
        print(as_json(config, machine, rows))
    else:
        print_estimate(config, machine, rows)


def named_config(options) -> str:
    """The config that was named, in either way."""
    if (options.config is None) == (options.preset is None):
        raise ValueError("name one config: a preset or FILE.yaml (sgtm config lists the presets)")
    return options.config or options.preset
