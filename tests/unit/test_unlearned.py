"""`unlearned.json`: written, read, described in a sentence; a damaged one is named."""

from __future__ import annotations

import pytest

from sgtm.report.findings import cautions
from sgtm.run.unlearned import FILE, described, read_unlearned, write_unlearned

RECORD = {
    "method": "npo",
    "options": {"beta": 0.1, "retain_weight": 1.0},
    "domain": "es",
    "steps": 125,
    "lr": 1 / 60000,
    "seed": 3,
    "source": {"run": "none", "checkpoint": "step_00002000", "step": 2000},
}
SENTENCE = (
    "Unlearned: `es` by `npo` (beta 0.1, retain_weight 1), 125 steps at learning rate 1.67e-05, seed 3, from run "
    "`none` after step 2,000."
)


def test_a_record_is_read_as_written(tmp_path):
    assert read_unlearned(tmp_path) is None
    write_unlearned(tmp_path, RECORD)
    assert read_unlearned(tmp_path) == RECORD


def test_method_options_and_source_are_in_the_sentence():
    assert described(RECORD) == SENTENCE
    assert described(RECORD | {"method": "finetune", "options": {}, "steps": 1}).startswith(
        "Unlearned: `es` by `finetune`, 1 step at"
    )


def test_report_and_evaluation_show_it():
    assert cautions({"unlearned": RECORD}) == [SENTENCE]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"method": "npo"}'])
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=r"unlearned\.json is damaged \(.*\); unlearn the run again"):
        read_unlearned(tmp_path)
