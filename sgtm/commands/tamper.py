"""`sgtm tamper`."""

from __future__ import annotations

import sys
from pathlib import Path

from sgtm.commands.options import AMOUNT, COUNT, DATA, Subcommands

MIXTURES, SCHEDULES = ("forget", "forget+retain", "adjacent"), ("constant", "cosine")


def add(commands: Subcommands) -> None:
    parser = commands.add("tamper", run, "fine-tune the ablated model of a run to win a domain back")
    parser.description = (
        "Attacks the ablated model of a run by fine-tuning, in every combination of data, schedule and learning rate, "
        "and prints the lowest held-out loss on the domain that any attack has reached, by number of steps "
        "(docs/evaluation.md). Rows go to RUN/tamper.jsonl; called again it runs what is missing there."
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run directory, e.g. runs/quickstart")
    parser.add_argument("--domain", nargs="+", metavar="NAME", help="domains to win back (default: the only one)")
    mixtures = "data of the attacks (default: forget and forget+retain, and adjacent with --adjacent)"
    parser.add_argument("--data", nargs="+", choices=MIXTURES, metavar="DATA", help=mixtures)
    about = "categories of the data `adjacent`"
    parser.add_argument("--adjacent", nargs="+", default=[], metavar="CATEGORY", help=about)
    about = "learning rates, as multiples of the run's peak (default: 0.1 0.25 1 3)"
    parser.add_argument("--lr", nargs="+", type=AMOUNT, metavar="X", help=about)
    about = "schedules of the learning rate (default: constant and cosine)"
    parser.add_argument("--schedule", nargs="+", choices=SCHEDULES, metavar="NAME", help=about)
    about = "budgets; a cosine runs for each, a constant rate for the longest (default: 16 64 256)"
    parser.add_argument("--steps", nargs="+", type=COUNT, metavar="N", help=about)
    parser.add_argument("--tokens", type=COUNT, metavar="N", help="of a step (default: as in the training)")
    parser.add_argument("--warmup", type=float, metavar="SHARE", help="of the steps (default: 0.1)")
    parser.add_argument("--weight-decay", type=float, metavar="X", help="of matrices (default: 0)")
    about = "held-out sequences of each category (default: 64, or all where there are fewer)"
    parser.add_argument("--sequences", type=COUNT, metavar="N", help=about)
    parser.add_argument("--seed", type=int, metavar="N", help="of the order of the data (default: 0)")
    about = "a control under the same attacks, such as a run trained without the domain"
    parser.add_argument("--against", type=Path, metavar="RUN2", help=about)
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--target-loss", type=AMOUNT, metavar="NATS", help="print the step by which it is reached")
    goal.add_argument("--baseline", type=Path, metavar="RUN3", help="the same, to the loss of this run's full model")
    parser.add_argument("--again", action="store_true", help="run all attacks, and replace their rows")
    parser.add_argument("--data.path", dest="data_path", metavar="DIR", help=DATA)


def run(options) -> None:
    from sgtm.run.located import check_run

    for folder in filter(None, (options.run_dir, options.against, options.baseline)):
        check_run(folder, options.data_path)  # mistakes come before anything heavy is imported

    from sgtm.evaluation.tampering import worst_case
    from sgtm.masking.labels import removal_name
    from sgtm.report.tampering import Curve, print_tampering
    from sgtm.run.evaluate import check_sample
    from sgtm.run.opened import check_control, check_same_sequences, knowing_control, open_with_corpus
    from sgtm.run.tamper_plan import SEQUENCES, make_plan
    from sgtm.run.tampering import attack_run, full_loss

    attacked = open_with_corpus(options.run_dir, options.data_path)
    others = (options.against, options.baseline)
    control, baseline = (open_with_corpus(folder, options.data_path) if folder else None for folder in others)
    if control:
        check_control(attacked, control)
    if baseline:
        check_same_sequences(attacked, baseline)
    settings = {
        "domains": options.domain,
        "data": options.data or ([*MIXTURES] if options.adjacent else None),
        "adjacent": options.adjacent,
        "multiples": options.lr,
        "schedules": options.schedule,
        "budgets": options.steps,
        "tokens": options.tokens,
        "warmup": options.warmup,
        "weight_decay": options.weight_decay,
        "sequences": options.sequences,
        "seed": options.seed,
    }
    plan = make_plan(attacked, **{name: value for name, value in settings.items() if value is not None})
    if options.sequences:
        measured = (*plan.forget, *plan.retain)
        option = ("--sequences", f"leave it out for up to {SEQUENCES}")
        check_sample(attacked.corpus, attacked.config, "test", measured, options.sequences, *option)
    if control and (warning := knowing_control(control, plan.domains)):
        print(f"warning: {warning}", file=sys.stderr)
    goal = ("the target loss", options.target_loss) if options.target_loss else None
    if baseline:
        goal = f"the loss of {baseline.config.name} (full)", full_loss(baseline, plan)
    curves = [
        Curve(
            target.config.name,
            removal_name(target.removed(plan.domains)),
            worst_case(attack_run(target, plan, again=options.again, note=print)),
        )
        for target in (attacked, control)
        if target
    ]
    print_tampering(curves[0], curves[1] if control else None, goal)
