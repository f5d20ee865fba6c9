"""Post-hoc unlearning of a sweep's unmasked model, at settings chosen from a grid, as a baseline for masks.

    sgtm sweep launch/recipes/claims.sweep.yaml
    python benchmarks/unlearning.py launch/recipes/claims.sweep.yaml --json benchmarks/results/DEVICE/unlearning.jsonl

Every setting of GRID is tried on the variant's first seed and measured on split train, never on test. Chosen is, for
each method, the setting with the highest forget loss among those whose retain loss is at most BUDGET nats above that
of the model before; a method without one is left out. The chosen settings are then applied to every seed, into the
sweep's folder as VARIANT-sSEED-METHOD, where `sgtm tamper` and benchmarks/recipes.py take them, and measured on split
test. Runs that are there are kept; one of another setting than the chosen is an error.

Rows: one for each setting (`method`, `options`, `lr` and `steps`, `retain` and `forget` after, `retain_before`,
`forget_before`, `chosen`), and one for each chosen setting as benchmarks/recipes.py writes a variant's.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Collection
from itertools import product
from pathlib import Path

import torch
from environment import write_rows
from variant_rows import variant_row

from sgtm.config.load import load_run_config
from sgtm.evaluation.losses import evaluate
from sgtm.files import sha256_of
from sgtm.run.checkpoint import MANIFEST, open_run, read_manifest
from sgtm.run.evaluate import load_bases, load_model, open_run_corpus
from sgtm.run.unlearned import read_unlearned
from sgtm.sweep.file import Run, Sweep, read_sweep
from sgtm.unlearning.methods import METHODS
from sgtm.unlearning.run import unlearn_run

BUDGET = 0.1  # nats
RMU = [{"layer": 2, "coefficient": c, "alpha": a} for c in (20.0, 40.0, 80.0) for a in (1.0, 10.0, 100.0)]
GRID: dict[str, list[tuple[dict, float]]] = {
    "rmu": [*product(RMU, (1.0, 3.0))],
    "npo": [*product([{"beta": 0.1}, {"beta": 1.0}], (1.0, 3.0, 10.0, 30.0, 100.0))],
    "grad_diff": [*product([{}], (0.03, 0.1, 0.3, 1.0))],
}
"""By method its options, and the learning rate as a multiple of the method's default."""


def main() -> None:
    args = options_of_a_grid(__doc__, "unmasked", "a variant without masks").parse_args()
    sweep = read_sweep(args.sweep)
    runs = [run for run in sweep.runs if run.variant == args.variant]
    before = measured(runs[0].directory, "train", args.sequences, sweep.adjacent)
    tried = []
    for method, settings in GRID.items():
        for options, factor in settings:
            name = "-".join([runs[0].name, method, *(f"{value:g}" for value in options.values()), f"x{factor:g}"])
            out = sweep.folder.with_name(f"{sweep.folder.name}-unlearning") / name
            lr = apply(runs[0], method, options, factor, out)
            after = measured(out, "train", args.sequences, sweep.adjacent)
            losses = {data: after[f"full_{data}"] for data in ("retain", "forget")}
            losses |= {f"{data}_before": before[f"full_{data}"] for data in ("retain", "forget")}
            setting = {"method": method, "options": options, "factor": factor, "lr": lr, "steps": METHODS[method].steps}
            tried.append({**setting, **losses, "chosen": False})
            print(json.dumps({key: tried[-1][key] for key in ("method", "options", "factor", "retain", "forget")}))
    rows = []
    for method in GRID:
        best = choice([row for row in tried if row["method"] == method])
        if best is None:
            print(f"{method}: no setting within {BUDGET} nats")
            continue
        best["chosen"] = True
        rows.append(row_of(runs, method, chosen_runs(sweep, runs, best), masks=False))
    write_rows(args.json, [*rows, *tried])


def options_of_a_grid(about: str, variant: str, which: str) -> argparse.ArgumentParser:
    """Of a script that makes runs from those of a variant, at settings that it chooses."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("sweep", type=Path, metavar="SWEEP")
    parser.add_argument("--variant", default=variant, metavar="NAME", help=which)
    parser.add_argument("--sequences", type=int, default=128, metavar="N", help="of split train, for the choice")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    return parser


def choice(rows: list[dict]) -> dict | None:
    """The row of the highest forget loss within the budget."""
    within = [row for row in rows if row["retain"] <= row["retain_before"] + BUDGET]
    return max(within, key=lambda row: row["forget"], default=None)


def apply(run: Run, method: str, options: dict, factor: float, out: Path) -> float:
    """Unlearn a run at so many times the method's rate; returns the rate.

    Raises ValueError where `out` is there and was made at other settings, or from another checkpoint.
    """
    lr = factor * load_run_config(run.directory).optimizer.lr / METHODS[method].divisor
    if not out.exists():
        unlearn_run(run.directory, method, out, options=options, lr=lr)
    record = read_unlearned(out)
    if record is None or record["lr"] != lr or not options.items() <= record["options"].items():
        raise ValueError(f"{out} was not unlearned by {method} with {options} at {lr:g}; remove it")
    check_source(run, out, record)
    return lr


def check_source(run: Run, out: Path, record: dict) -> None:
    """Raises ValueError where the record of `out` names another checkpoint than the newest of the run."""
    _, checkpoint = open_run(run.directory)
    if record["source"]["manifest_sha256"] != sha256_of(checkpoint / MANIFEST):
        raise ValueError(f"{out} was made from another checkpoint than {checkpoint}; remove it")


def measured(run: Path, split: str, sequences: int | None, adjacent: Collection[str] = ()) -> dict[str, float]:
    """Means over categories, full and without all domains where the run has that: four losses, or two.

    adjacent  categories that do not count as retained
    """
    config, checkpoint = open_run(run)
    corpus = open_run_corpus(config, run, read_manifest(checkpoint))
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    model, bases = load_model(config, checkpoint).to(dtype), load_bases(config, checkpoint)
    bases = {domain: base.to(dtype) for domain, base in bases.items()}
    device = next(model.parameters()).device
    evaluation = evaluate(model, corpus, config, split=split, sequences=sequences, device=device, bases=bases)
    labels = {
        category: label for category, label in evaluation.sample["true_labels"].items() if category not in adjacent
    }
    return four_losses(evaluation.losses, labels)


def four_losses(losses: dict[str, dict[str, float]], true_labels: dict[str, str]) -> dict[str, float]:
    """From losses by condition, the full model first and the one without all domains last, and category."""
    conditions, means = list(losses), {}
    for model, condition in {"full": conditions[0], "ablated": conditions[-1]}.items():
        if model == "ablated" and len(conditions) == 1:
            continue
        for data in ("retain", "forget"):
            mine = [
                loss
                for category, loss in losses[condition].items()
                if category in true_labels and true_labels[category].startswith("forget:") == (data == "forget")
            ]
            means[f"{model}_{data}"] = statistics.fmean(mine)
    return means


def chosen_runs(sweep: Sweep, runs: list[Run], best: dict) -> list[dict]:
    """The chosen setting on every seed, measured on split test as at the end of the training."""
    seeds = []
    for run in runs:
        out = sweep.folder / f"{run.name}-{best['method']}"
        apply(run, best["method"], best["options"], best["factor"], out)
        seeds.append({"seed": run.seed, **measured(out, "test", run.config.train.eval_limit, sweep.adjacent)})
    return seeds


def row_of(runs: list[Run], method: str, seeds: list[dict], masks: bool) -> dict:
    """Of runs that a method has changed. masks: whether something can be removed."""
    train = runs[0].config.train
    name, tokens = f"{runs[0].variant} + {method}", train.steps * train.tokens_per_step
    return variant_row("unlearning", name, seeds, masks=masks, runs=len(runs), tokens=tokens)


if __name__ == "__main__":
    main()
