"""Examinations of the runs in a folder (`sgtm examine`), as rows: of a sweep's runs, and of runs made from them."""

from __future__ import annotations

from pathlib import Path

from sgtm.report.examination import examination_numbers
from sgtm.run.examine import FILE, read_examination
from sgtm.sweep.tampered import named_runs


def examination_rows(folder: Path) -> list[dict]:
    """A row for each run with an `examination.json`, and domain.

    examined  the variant's name, as in sgtm/sweep/tampered.py
    seed      of the training
    domain    that was examined
    split, sequences, control  of the examination, as `sgtm examine` was called
    values    by name of the number (sgtm/report/examination.py) and model: full, without the domain, and control where
              there was one

    Raises ValueError for a damaged file.
    """
    rows = []
    for run, variant, seed in named_runs(folder, FILE):
        results = read_examination(run / FILE)
        settings = {name: results.get(name) for name in ("split", "sequences", "control")}
        for domain, examined in results["domains"].items():
            try:
                values = {
                    name: {model: estimate["value"] for model, estimate in by_model.items()}
                    for name, by_model in examination_numbers(examined)
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                message = f"{run / FILE} is damaged ({error!r}); remove it, and examine the run again"
                raise ValueError(message) from None
            rows.append({"examined": variant, "seed": seed, "domain": domain, **settings, "values": values})
    return rows
