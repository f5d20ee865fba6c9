"""Rows have null for the losses of a run that has diverged: a claim that reads one is not tested, and says why."""

from __future__ import annotations

import pytest
from studies import row, write_rows

from sgtm.sweep.study import read_study


@pytest.fixture
def measured(benchmarks, tmp_path):
    """What the table of claims has of a measure of these rows."""
    import claims

    def measured(measure, lines):
        claim = claims.Claim("P", "text", "quantity", 0.0, False, measure)
        return claims._measured(claim, read_study(write_rows(tmp_path / "mine.jsonl", lines)))

    return measured


def variants(*names: str) -> list[dict]:
    return [
        row(name, (loss, 2.0, loss, 4.0), masks=name == "mine") for name, loss in zip(names, (1, 2, 3), strict=False)
    ]


def test_differences_of_a_diverged_run(measured):
    import claim_measures

    lines = variants("mine", "other")
    lines[0]["seeds"][1] |= {"ablated_forget": None, "ablated_retain": None}
    difference = claim_measures.difference(("mine", "ablated_forget"), ("other", "ablated_forget"))
    for measure in (difference, claim_measures.at_equal_retain("mine", "other")):
        assert measured(measure, lines) == ("", "not tested: a run has diverged")


@pytest.mark.parametrize("diverged", [0, 1])
def test_penalties_of_a_diverged_run_and_of_a_diverged_baseline(measured, diverged):
    import claim_measures

    lines = [row("mine", (3.3, 5.0, 3.0, 5.0)), row("unmasked", (3.0, 5.0, 3.0, 5.0), masks=False)]
    for steps, loss in ((500, 4.2), (1500, 2.4)):
        settings = {"settings": {"train.steps": steps}, "tokens": steps}
        lines.append(row(f"unmasked-{steps}", (loss, 5.0, loss, 5.0), masks=False) | settings)
    assert "not tested" not in measured(penalty := claim_measures.penalty("mine", "full_retain", "unmasked"), lines)[1]
    lines[diverged]["seeds"][1]["full_retain"] = None
    assert measured(penalty, lines) == ("", "not tested: a run has diverged")


def test_lengths_that_share_no_seed_with_the_baseline(measured):
    import claim_measures

    lines = [row("mine", (3.3, 5.0, 3.0, 5.0)), row("unmasked", (3.0, 5.0, 3.0, 5.0), masks=False)]
    for steps in (500, 1500):
        settings = {"settings": {"train.steps": steps}, "tokens": steps}
        lines.append(row(f"unmasked-{steps}", (4.0, 5.0, 4.0, 5.0), masks=False) | settings)
    for seed in lines[2]["seeds"]:
        seed["seed"] += 10
    message = ("", "not tested: without unmasked-500 of a seed of unmasked")
    assert measured(claim_measures.penalty("mine", "full_retain", "unmasked"), lines) == message
