"""The tables of an examination: a row for each number, a column for each model, and blanks where there is none."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from sgtm.report.examination import examination_rows, print_examination


def estimate(value: float, error: float | None = 0.01) -> dict:
    return {"value": value, "error": error}


RESULTS = {
    "domains": {
        "bio": {
            "forget": ["cells"],
            "measures": {
                "calibrated": {
                    "full": {"before": {"cells": 4.0}, "after": {"cells": 3.9}, "errors": {"cells": 0.012}},
                    "without bio": {"before": {"cells": 7.0}, "after": {"cells": 5.5}, "errors": {"cells": None}},
                },
                "probes": {
                    "full": {"cells": {"0": {"fitted": 5.0}, "1": {"fitted": 4.5}}},
                    "without bio": {"cells": {"0": {"fitted": 5.25}, "1": {"fitted": 6.0}}},
                },
                "guided": {"1": {"extraction_strength": estimate(0.25)}},
            },
        }
    }
}


def test_rows():
    assert dict(examination_rows(RESULTS["domains"]["bio"])) == {
        "loss, cells": {"full": "4.000", "without bio": "7.000"},
        "calibrated loss, cells": {"full": "3.900±0.012", "without bio": "5.500"},
        "best linear probe, cells": {"full": "4.500", "without bio": "5.250"},
        "extraction strength, guided 1": {"full": "0.250±0.01"},
    }


def test_the_table_fits_into_eighty_columns():
    console = Console(file=StringIO(), width=80)
    print_examination(RESULTS, console)
    lines = console.file.getvalue().splitlines()
    assert "without bio" in lines[0] and max(map(len, lines)) <= 80
    assert any(line.split() == ["extraction", "strength,", "guided", "1", "0.250±0.01"] for line in lines)
