"""Low-rank adapters on a sweep's filtered model, at a learning rate chosen from a few: the baseline FT-LoRA.

    sgtm sweep launch/recipes/claims.sweep.yaml
    python benchmarks/adapters.py launch/recipes/claims.sweep.yaml --json benchmarks/results/DEVICE/adapters.jsonl

The adapters read as many forget tokens as a run of `--seen` does, and as many retain tokens on top. The rate
is chosen on the first seed and split train: the lowest forget loss of the full model. Every seed is then adapted at
that rate, as VARIANT-sSEED-adapters in the sweep's folder, and measured on split test. Runs that are there are kept.

Rows: one for each rate (`factor` of the run's peak, `retain` and `forget` of the full model, `chosen`), and one as
benchmarks/recipes.py writes a variant's.
"""

from __future__ import annotations

import json
from pathlib import Path

from environment import write_rows
from unlearning import check_source, measured, options_of_a_grid, row_of

from sgtm.data.open import open_corpus
from sgtm.data.trained import trained_tokens
from sgtm.run.adapted import read_adapted
from sgtm.sweep.file import Run, read_sweep
from sgtm.unlearning.adapt import adapt_run

FACTORS = (0.3, 1.0, 3.0, 10.0)
RANK, ALPHA = 16, 32.0


def main() -> None:
    parser = options_of_a_grid(__doc__, "filtered", "one that never saw the domain")
    parser.add_argument("--seen", default="unmasked", metavar="NAME", help="a variant that saw the domain")
    args = parser.parse_args()
    sweep = read_sweep(args.sweep)
    runs = [run for run in sweep.runs if run.variant == args.variant]
    steps = steps_of(runs[0], next(run for run in sweep.runs if run.variant == args.seen))
    tried = []
    for factor in FACTORS:
        out = sweep.folder.with_name(f"{sweep.folder.name}-unlearning") / f"{runs[0].name}-adapters-{factor}"
        adapt(runs[0], factor, steps, out)
        losses = measured(out, "train", args.sequences, sweep.adjacent)
        options = {"rank": RANK, "alpha": ALPHA, "steps": steps}
        setting = {"method": "adapters", "options": options, "factor": factor}
        full = {"retain": losses["full_retain"], "forget": losses["full_forget"]}
        tried.append({**setting, **full, "chosen": False})
        print(json.dumps(tried[-1]))
    best = min(tried, key=lambda row: row["forget"])
    best["chosen"] = True
    seeds = []
    for run in runs:
        out = sweep.folder / f"{run.name}-adapters"
        adapt(run, best["factor"], steps, out)
        losses = measured(out, "test", run.config.train.eval_limit, sweep.adjacent)
        seeds.append({"seed": run.seed, **losses})
    write_rows(args.json, [row_of(runs, "adapters", seeds, masks=True), *tried])


def steps_of(run: Run, seen: Run) -> int:
    """Steps in which adapters of `run` read as many forget tokens as the run `seen` was trained on."""
    corpus = open_corpus(seen.config, write=False)
    tokens = sum(
        sum(row.values()) for true, row in trained_tokens(corpus, seen.config).items() if true.startswith("forget:")
    )
    config = run.config
    return round(tokens / (config.for_ranks(1).micro_batch * config.model.context))


def adapt(run: Run, factor: float, steps: int, out: Path) -> None:
    """Adapt a run at so many times its peak rate, unless it has been.

    Raises ValueError where `out` is there and was made at other settings, or from another checkpoint.
    """
    lr = factor * run.config.optimizer.lr
    if not out.exists():
        adapt_run(run.directory, out, rank=RANK, alpha=ALPHA, steps=steps, lr=lr)
    record = read_adapted(out)
    settings = {"rank": RANK, "alpha": ALPHA, "steps": steps, "lr": lr}
    if record is None or not settings.items() <= {**record, **record["options"]}.items():
        raise ValueError(f"{out} was not adapted with {settings}; remove it")
    check_source(run, out, record)


if __name__ == "__main__":
    main()
