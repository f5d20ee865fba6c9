"""`sgtm adapt`."""

from __future__ import annotations

from pathlib import Path

from sgtm.commands.options import AMOUNT, COUNT, DATA, Subcommands, natural, weight


def add(commands: Subcommands) -> None:
    parser = commands.add("adapt", run, "low-rank adapters of a domain on a filtered run, as a baseline: a new run")
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run directory, mostly of a run without the domain")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN2", help="run directory to write")
    parser.add_argument("--domain", metavar="DOMAIN", help="domain to train adapters of (default: the run's only one)")
    parser.add_argument("--rank", type=natural, default=16, metavar="R", help="of every adapter (default: 16)")
    parser.add_argument("--alpha", type=AMOUNT, default=32.0, metavar="A", help="scale: A / R (default: 32)")
    parser.add_argument("--steps", type=COUNT, metavar="N", help="updates (default: one pass over the domain's text)")
    parser.add_argument("--lr", type=AMOUNT, metavar="LR", help="learning rate, constant (default: the run's peak)")
    about = "weight of the loss on retain text; 0 reads none (default: 1)"
    parser.add_argument("--retain-weight", type=weight, default=1.0, metavar="W", help=about)
    parser.add_argument("--seed", type=natural, default=0, help="of the adapters, and order of the text (default: 0)")
    parser.add_argument("--data.path", dest="data_path", metavar="DIR", help=DATA)


def run(options) -> None:
    from sgtm.run.located import check_run

    check_run(options.run_dir, options.data_path)  # before anything heavy is imported
    from sgtm.unlearning.adapt import adapt_run

    adapt_run(
        options.run_dir,
        options.out,
        domain=options.domain,
        rank=options.rank,
        alpha=options.alpha,
        retain_weight=options.retain_weight,
        steps=options.steps,
        lr=options.lr,
        seed=options.seed,
        data=options.data_path,
    )
    print(f"done: {options.out}; next: sgtm eval {options.out}")
