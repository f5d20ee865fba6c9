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
        run, config = file.parent, load_run_config(file.parent)
        name, unlearned = run.name, read_unlearned(run)
        if unlearned:
            name = f"{unlearned['source']['run']} + {unlearned['method']}"
        elif adapted := read_adapted(run):
            name = f"{adapted['source']['run']} + adapters"
        seed = config.train.seed
        for condition, reached in read_reached(run).items():
            if not any(math.isfinite(each.loss) for each in reached):
                continue
            worst = worst_case(reached)
            tokens = {each.step: each.attack.tokens * each.step for each in reached}
            curve = [
                {"step": step, "tokens": tokens[step], "forget": r.loss, "error": r.error, "retain": r.retain}
                for step, r in worst.items()
            ]
            variant = name.replace(f"-s{seed}", "", 1)
            rows.append({"tampered": variant, "seed": seed, "condition": condition, "curve": curve})
    return rows
