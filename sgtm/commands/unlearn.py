"""`sgtm unlearn`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sgtm.commands.options import AMOUNT, COUNT, DATA, Subcommands, natural

METHODS = ("gradient_ascent", "grad_diff", "npo", "simnpo", "rmu", "finetune")
"""As in sgtm/unlearning/methods.py, which takes torch."""


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number from 0 on, got {text!r}")
    return value


OPTIONS = {
    "beta": (AMOUNT, "B", "npo (0.1), simnpo (4.5): inverse temperature"),
    "gamma": (_number, "G", "simnpo (0): margin"),
    "forget_weight": (_number, "W", "simnpo (0.125): weight of the forget term"),
    "retain_weight": (_number, "W", "grad_diff, npo, simnpo (1): weight of the retain term"),
    "layer": (natural, "L", "rmu: layer to steer, from 0 (default: 7/32 of the depth)"),
    "coefficient": (AMOUNT, "C", "rmu (6.5): norm that forget text is steered to"),
    "alpha": (_number, "A", "rmu (1200): weight of the retain term"),
}


def add(commands: Subcommands) -> None:
    parser = commands.add("unlearn", run, "post-hoc unlearning of a domain, as a baseline: writes a new run")
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run directory, mostly of an unmasked run")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="RUN2", help="run directory to write")
    parser.add_argument("--domain", metavar="DOMAIN", help="domain to unlearn (default: the run's only one)")
    parser.add_argument("--steps", type=COUNT, metavar="N", help="updates (default: 125, rmu 150)")
    share = "learning rate, constant (default: the run's peak / 30, gradient_ascent / 12, rmu / 6)"
    parser.add_argument("--lr", type=AMOUNT, metavar="LR", help=share)
    parser.add_argument("--seed", type=natural, default=0, help="order of the text, and rmu's direction (default: 0)")
    for name, (kind, value, about) in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=value, help=about)
    parser.add_argument("--data.path", dest="data_path", metavar="DIR", help=DATA)


def run(options) -> None:
    from sgtm.run.located import check_run

    check_run(options.run_dir, options.data_path)  # before anything heavy is imported
    from sgtm.unlearning.run import unlearn_run

    own = {name: value for name in OPTIONS if (value := getattr(options, name)) is not None}
    unlearn_run(
        options.run_dir,
        options.method,
        options.out,
        domain=options.domain,
        options=own,
        steps=options.steps,
        lr=options.lr,
        seed=options.seed,
        data=options.data_path,
    )
    print(f"done: {options.out}; next: sgtm eval {options.out}")
