"""Worst-case tamper curves of the runs in a folder, as rows: of a sweep's runs, and of runs unlearned from them or
adapted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from sgtm.config.load import load_run_config
from sgtm.evaluation.tampering import worst_case
from sgtm.run.adapted import read_adapted
from sgtm.run.tampering import FILE, read_grids
from sgtm.run.unlearned import read_unlearned


def named_runs(folder: Path, file: str) -> Iterator[tuple[Path, str, int]]:
    """(run, variant, seed) of each run in the folder that has the file. The variant of a run made from another is its
    source's and how, unless another run has the same: then the run's own name."""
    runs = [path.parent for path in sorted(folder.glob(f"*/{file}"))]
    names = {run: _variant_of(run) for run in runs}
    for run, name in names.items():
        variant, seed = name
        yield run, variant if list(names.values()).count(name) == 1 else run.name, seed


def _variant_of(run: Path) -> tuple[str, int]:
    source, how = run.name, ""
    if unlearned := read_unlearned(run):
        source, how = unlearned["source"]["run"], f" + {unlearned['method']}"
    elif adapted := read_adapted(run):
        source, how = adapted["source"]["run"], " + adapters"
    variant, _, seed = source.rpartition("-s")
    return (f"{variant}{how}", int(seed)) if seed.isdecimal() else (source + how, load_run_config(run).train.seed)


def tamper_rows(folder: Path) -> list[dict]:
    """A row for each run with a `tamper.jsonl` whose attacks reached a finite loss.

    tampered   the variant's name; of an unlearned run its source's variant and the method, of an adapted one
               that and `adapters`
    seed       of the training
    condition  what the run was attacked without
    sequences  of each category that the losses are of, at most
    tokens     of a step
    attacks    that the worst case is of, those of the grid of the most steps: for each its (step, forget)
    curve      by evaluated step: step, tokens, forget (nats, the lowest of all attacks so far), error (standard error
               over documents) and retain of the same attack

    Raises ValueError for a damaged file.
    """
    rows = []
    for run, variant, seed in named_runs(folder, FILE):
        for condition, (sequences, reached) in read_grids(run).items():
            if not any(math.isfinite(each.loss) for each in reached):
                continue
            worst = worst_case(reached)
            tokens = {each.step: each.attack.tokens * each.step for each in reached}
            curve = [
                {"step": step, "tokens": tokens[step], "forget": r.loss, "error": r.error, "retain": r.retain}
                for step, r in worst.items()
            ]
            losses: dict[str, dict[int, float]] = {}
            for each in reached:
                if math.isfinite(each.loss):
                    losses.setdefault(str(each.attack), {})[each.step] = each.loss
            attacks = {name: sorted(by_step.items()) for name, by_step in losses.items()}
            about = {"tampered": variant, "seed": seed, "condition": condition, "sequences": sequences}
            rows.append({**about, "tokens": reached[0].attack.tokens, "curve": curve, "attacks": attacks})
    return rows
