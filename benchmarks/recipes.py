"""The tables of sweeps as a results file, with compute ratios.

    sgtm sweep launch/recipes/novels.sweep.yaml
    sgtm sweep launch/recipes/novels-lengths.sweep.yaml
    python benchmarks/recipes.py launch/recipes/novels.sweep.yaml launch/recipes/novels-lengths.sweep.yaml \
        --json FILE [--shipped NAME] [--partial]

A row for each variant: the four losses (docs/sweep.md; mean and sample standard deviation over the seeds) and, where
there are baselines of three lengths, three compute ratios (sgtm/evaluation/compute_ratio.py): of the full model's two
losses on the curve of `unmasked`, of the ablated model's retain loss on that of `filtered`. The first curve is through
the last evaluations of `unmasked`, `unmasked-450` and so on: the same baseline trained for other numbers of steps. Rows
of other sweeps in FILE stay, and all ratios are recomputed from all rows. Device, commit, versions and time are those
of the training (`environment.jsonl` of each run), not of this script. Unfinished runs are an error unless `--partial`
is given; then variants and seeds that these sweeps have not finished here stay as they are in FILE, and a row whose
seeds come from several machines names them all. The worst-case tamper curves of runs in
the sweeps' folders (`sgtm tamper`) and their examinations (`sgtm examine`) follow, with the environment of this script.
`sgtm report FILE` draws the figures of all of it.

`--shipped` also writes the losses of the first sweep's `unmasked` and `filtered` by category to
sgtm/report/baselines/NAME.json, which `sgtm quickstart` shows beside its own.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

from environment import environment, read_rows
from variant_rows import over_seeds

from sgtm.evaluation.compute_ratio import LEAST, LearningCurve
from sgtm.report.baselines import FOLDER, basis
from sgtm.run.environment import last_environment
from sgtm.run.examine import SAMPLES, SETTINGS
from sgtm.sweep.examined import examination_rows
from sgtm.sweep.file import read_sweep
from sgtm.sweep.table import SIX
from sgtm.sweep.tampered import tamper_rows

BASELINES = ("unmasked", "filtered")
KEYS = ("sweep", "variant", "tampered", "examined", "seed", "condition", "domain", *SETTINGS[:2], *SAMPLES)
"""Of a row: what a new one replaces has the same, or lacks the same."""
OF_A_RUN = {"train.seed", "data.path"}
"""Settings that seeds of one variant need not share."""
RATIOS = {"full_retain": "unmasked", "full_forget": "unmasked", "ablated_retain": "filtered"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", type=Path, nargs="+", metavar="SWEEP")
    parser.add_argument("--json", type=Path, required=True, help="write one JSON object per variant")
    parser.add_argument("--partial", action="store_true", help="collect what is finished")
    parser.add_argument("--shipped", metavar="NAME", help="write sgtm/report/baselines/NAME.json too")
    args = parser.parse_args()
    sweeps = [read_sweep(path) for path in args.sweeps]
    names = [sweep.folder.name for sweep in sweeps]
    earlier = read_rows(args.json) if args.json.exists() else []
    rows = [row for row in earlier if args.partial or row["sweep"] not in names]
    for sweep, name in zip(sweeps, names, strict=True):
        variants = finished(sweep.folder, args.partial)
        several = any(len(row["seeds"][0]["losses"]) > 2 for row in variants)
        collected = [{"sweep": name, **short(row, several), **trained(row, sweep.folder)} for row in variants]
        more = [*tamper_rows(sweep.folder), *examination_rows(sweep.folder)]
        rows = merged(rows, [*collected, *({"sweep": name, **row, **environment()} for row in more)])
    with_losses = [row for row in rows if "variant" in row]
    lines = [{**row, "ratios": ratios(row, with_losses)} for row in with_losses]
    lines += [row for row in rows if "variant" not in row]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if args.shipped:
        baselines = [row for row in finished(sweeps[0].folder, args.partial) if row["variant"] in BASELINES]
        losses = {row["variant"]: by_category(row) for row in baselines}
        about = {key: trained(baselines[0], sweeps[0].folder)[key] for key in ("device", "commit", "time")}
        text = {"sweep": args.sweeps[0].name, **about, "basis": basis(sweeps[0].runs[0].config), "losses": losses}
        (FOLDER / f"{args.shipped}.json").write_text(json.dumps(text, indent=2) + "\n")


def merged(rows: list[dict], new: list[dict]) -> list[dict]:
    """The rows with the new ones in their places, or behind them; seeds that only an old one has stay in it."""
    by_key = {tuple(map(row.get, KEYS)): row for row in rows}
    for row in new:
        key = tuple(map(row.get, KEYS))
        by_key[key] = with_seeds_of(by_key[key], row) if "variant" in row and key in by_key else row
    return list(by_key.values())


def with_seeds_of(old: dict, row: dict) -> dict:
    """The row, with the seeds that only the old one has. Raises SystemExit where the two have not the same settings."""
    own = {seed["seed"] for seed in row["seeds"]}
    missing = [seed for seed in old["seeds"] if seed["seed"] not in own]
    if not missing:
        return row
    if "settings" not in old:
        sys.exit(f"variant {row['variant']}: its earlier row has no settings; collect all seeds without --partial")
    for name in sorted(old["settings"].keys() & row["settings"].keys() - OF_A_RUN):
        was, now = old["settings"][name], row["settings"][name]
        if was != now:
            sys.exit(f"variant {row['variant']}: {name} was {was} and is {now}; collect all seeds without --partial")
    seeds = sorted([*missing, *row["seeds"]], key=lambda seed: seed["seed"])
    losses = over_seeds(seeds, [loss for loss in SIX if loss in row])
    counts = {"finished": len(seeds), "runs": max(len(seeds), old["runs"], row["runs"])}
    origin = {key: ", ".join(dict.fromkeys(f"{old[key]}, {row[key]}".split(", "))) for key in ("device", "commit")}
    return {**row, **losses, **counts, **origin, "seeds": seeds}


def finished(folder: Path, partial: bool) -> list[dict]:
    """Rows of a sweep's table.jsonl with a finished run. Raises SystemExit if others are missing and not `partial`."""
    rows = [json.loads(line) for line in (folder / "table.jsonl").read_text().splitlines()]
    missing = [f"{row['variant']}: {row['finished']} of {row['runs']}" for row in rows if row["finished"] < row["runs"]]
    if missing and not partial:
        sys.exit(f"{folder}: unfinished runs ({'; '.join(missing)}); finish the sweep, or collect with --partial")
    return [row for row in rows if row["finished"]]


def trained(row: dict, folder: Path) -> dict:
    """Environment of a variant's runs; where they differ in commit, all commits, and the newest run's other values."""
    starts = (last_environment(folder / seed["run"]) for seed in row["seeds"])
    environments = sorted(filter(None, starts), key=lambda one: one["time"])
    if not environments:
        sys.exit(f"variant {row['variant']}: its runs have no environment.jsonl; train them again")
    return {**environments[-1], "commit": ", ".join(dict.fromkeys(str(one["commit"]) for one in environments))}


def short(row: dict, several: bool = False) -> dict:
    """A row of table.jsonl without the runs' names, and without losses by category unless a variant of the sweep has
    `several` domains."""
    keys = ("seed", *SIX, "evaluations", "residual", *["losses"] * several)
    seeds = [{key: seed[key] for key in keys if key in seed} for seed in row["seeds"]]
    return {**row, "seeds": seeds}


def ratios(row: dict, rows: list[dict]) -> dict[str, dict]:
    """Compute ratios of a row's losses by name: value, and whether it is extrapolated."""
    by_loss = {}
    for loss, baseline in RATIOS.items():
        points = [other for other in rows if re.fullmatch(rf"{baseline}(-\d+)?", other["variant"])]
        if len(points) < LEAST or row[loss] is None:
            continue
        ends_with = f"full_{loss.split('_')[1]}"
        whole = next(other["tokens"] for other in points if other["variant"] == baseline)
        curve = LearningCurve([other["tokens"] / whole for other in points], [other[ends_with] for other in points])
        share, extrapolated = curve.reached(row[loss])
        by_loss[loss] = {"value": round(share, 4), "extrapolated": extrapolated}
    return by_loss


def by_category(row: dict) -> dict[str, float]:
    """Mean over the seeds of the full model's loss on each category."""
    categories = row["seeds"][0]["losses"]["full"]
    return {name: statistics.fmean(seed["losses"]["full"][name] for seed in row["seeds"]) for name in categories}


if __name__ == "__main__":
    main()
