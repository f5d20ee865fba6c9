"""Examinations of the runs in a folder (`sgtm examine`), as rows: of a sweep's runs, and of runs made from them."""

from __future__ import annotations

import json
from pathlib import Path

from sgtm.report.examination import examination_numbers
from sgtm.run.examine import FILE
from sgtm.sweep.tampered import named_runs


def examination_rows(folder: Path) -> list[dict]:
    """A row for each run with an `examination.json`, and domain.

    examined  the variant's name, as in sgtm/sweep/tampered.py
    seed      of the training
    domain    that was examined
    values    by name of the number (sgtm/report/examination.py) and model: full, without the domain, and control where
              there was one

    Raises ValueError for a damaged file.
    """
    rows = []
    for run, variant, seed in named_runs(folder, FILE):
        file = run / FILE
        try:
            domains = json.loads(file.read_text("utf-8"))["domains"]
            for domain, examined in domains.items():
                values = {
                    name: {model: estimate["value"] for model, estimate in by_model.items()}
                    for name, by_model in examination_numbers(examined)
                }
                rows.append({"examined": variant, "seed": seed, "domain": domain, "values": values})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error!r}); examine the run again") from None
    return rows
