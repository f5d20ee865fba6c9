"""The tables of an examination: a row for each number, a column for each model, and blanks where there is none."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from sgtm.report.examination import examination_rows, overfitted, print_examination


def estimate(value: float, error: float | None = 0.01) -> dict:
    return {"value": value, "error": error}


def calibrated(before: float, after: float, error: float | None, retain: float) -> dict:
    """retain: loss on retained text after, 3 before"""
    losses = {
        "before": {"cells": estimate(before, 0.5), "en": estimate(3.0, None)},
        "after": {"cells": estimate(after, error), "en": estimate(retain, None)},
    }
    return {**losses, "targets": {"cells": 900, "en": 1234}}


def probe(fitted: float, chosen: float) -> dict:
    return {"fitted": estimate(fitted, 0.25), "chosen": chosen}


RESULTS = {
    "split": "test",
    "sequences": 9,
    "domains": {
        "bio": {
            "forget": ["cells"],
            "retain": ["en"],
            "measures": {
                "calibrated": {
                    "full": calibrated(4.0, 3.9, 0.012, retain=3.01),
                    "without bio": calibrated(7.0, 5.5, None, retain=3.03),
                },
                "probes": {
                    "full": {"cells": {"0": probe(4.4, 5.0), "1": probe(4.5, 4.5)}},
                    "without bio": {"cells": {"0": probe(5.25, 5.0), "1": probe(6.0, 6.0)}},
                },
                "guided": {"1": {"extraction_strength": estimate(0.25)}},
            },
        }
    },
}


def test_rows():
    assert dict(examination_rows(RESULTS["domains"]["bio"])) == {
        "loss, cells": {"full": "4.000±0.5", "without bio": "7.000±0.5"},
        "calibrated loss, cells": {"full": "3.900±0.012", "without bio": "5.500"},
        "best linear probe, cells": {"full": "4.500±0.25", "without bio": "5.250±0.25"},
        "extraction strength, guided 1": {"full": "0.250±0.01"},
    }


def test_the_table_fits_into_eighty_columns():
    console = Console(file=StringIO(), width=80)
    print_examination(RESULTS, console)
    lines = console.file.getvalue().splitlines()
    assert "without bio" in lines[0] and max(map(len, lines)) <= 80
    printed = " ".join(" ".join(lines).split())
    assert "nats per token of split test, up to 9 sequences of each category" in printed
    assert "an attacker has the lower one" in printed
    assert any(line.split() == ["extraction", "strength,", "guided", "1", "0.250±0.01"] for line in lines)


def test_a_calibration_that_raises_retained_losses_is_warned_of():
    (line,) = overfitted(RESULTS)
    assert line.startswith(
        "calibrated, without bio: the biases raise the loss on en by 0.030 nats: they were fitted to"
    )
    assert "1,234 tokens of retained text, too few" in line
    console = Console(file=StringIO(), width=300)
    print_examination(RESULTS, console)
    assert f"warning: {line}" in console.file.getvalue()
