"""Worst-case tamper curves of the runs in a folder, as rows: of a sweep's runs, and of runs unlearned from them or
adapted."""

from __future__ import annotations

import math
from pathlib import Path

from sgtm.config.load import load_run_config
from sgtm.evaluation.tampering import worst_case
from sgtm.run.adapted import read_adapted
from sgtm.run.tampering import FILE, read_reached
from sgtm.run.unlearned import read_unlearned


def variant_of(run: Path) -> tuple[str, int]:
    """The variant's name and the seed of a run of a sweep; of a run made from one, its source's variant and how."""
    name, seed = run.name, load_run_config(run).train.seed
    if unlearned := read_unlearned(run):
        name = f"{unlearned['source']['run']} + {unlearned['method']}"
    elif adapted := read_adapted(run):
        name = f"{adapted['source']['run']} + adapters"
    return name.replace(f"-s{seed}", "", 1), seed


def tamper_rows(folder: Path) -> list[dict]:
    """A row for each run with a `tamper.jsonl` whose attacks reached a finite loss.

    tampered   the variant's name; of an unlearned run its source's variant and the method, of an adapted one
               that and `adapters`
    seed       of the training
    condition  what the run was attacked without
    curve      by evaluated step: step, tokens, forget (nats, the lowest of all attacks so far), error (standard error
               over documents) and retain of the same attack

    Raises ValueError for a damaged file.
    """
    rows = []
    for file in sorted(folder.glob(f"*/{FILE}")):
        variant, seed = variant_of(file.parent)
        for condition, reached in read_reached(file.parent).items():
            if not any(math.isfinite(each.loss) for each in reached):
                continue
            worst = worst_case(reached)
            tokens = {each.step: each.attack.tokens * each.step for each in reached}
            curve = [
                {"step": step, "tokens": tokens[step], "forget": r.loss, "error": r.error, "retain": r.retain}
                for step, r in worst.items()
            ]
            rows.append({"tampered": variant, "seed": seed, "condition": condition, "curve": curve})
    return rows
