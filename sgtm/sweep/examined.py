"""Examinations of the runs in a folder (`sgtm examine`), as rows: of a sweep's runs, and of runs made from them."""

from __future__ import annotations

from pathlib import Path

from sgtm.report.examination import examination_numbers
from sgtm.run.examine import FILE, SAMPLES, SETTINGS, read_examinations
from sgtm.sweep.tampered import named_runs


def examination_rows(folder: Path) -> list[dict]:
    """A row for each examination in an `examination.json`, and domain.

    examined  the variant's name, as in sgtm/sweep/tampered.py
    seed      of the training
    domain    that was examined
    split, sequences, control  of the examination, as `sgtm examine` was called; of the control its variant
    fit_sequences, passages, texts  the same where they were given; of the texts a SHA-256
    control_warning  that the control may have seen the domain, else empty; only with a control
    values    by name of the number (sgtm/report/examination.py) and model: full, without the domain, and control where
              there was one

    Raises ValueError for a damaged file.
    """
    rows = []
    for run, variant, seed in named_runs(folder, FILE):
        pairs = [(one, domain) for one in read_examinations(run / FILE) for domain in one["domains"]]
        for results, domain in pairs:
            examined = results["domains"][domain]
            settings = {name: results[name] for name in SETTINGS}
            settings |= {name: results[name] for name in SAMPLES if results.get(name) is not None}
            if results["control"]:
                settings |= {"control": _variant(results["control"]), "control_warning": results["control_warning"]}
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


def _variant(control: str) -> str:
    """Of the run of a sweep, by its name."""
    name = Path(control).name
    variant, _, seed = name.rpartition("-s")
    return variant if seed.isdecimal() else name
