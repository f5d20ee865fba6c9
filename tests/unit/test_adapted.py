"""`adapted.json`: written, read, described in a sentence; a damaged one is named."""

from __future__ import annotations

import pytest
from adapted_records import RECORD

from sgtm.report.findings import cautions
from sgtm.run.adapted import FILE, described_adapters, read_adapted, write_adapted

SENTENCE = (
    "Adapted: `es` by adapters of rank 16 (alpha 32, retain_weight 1), 125 steps at learning rate 0.00667, seed 3, "
    "from run `filtered` after step 2,000; without `es` it is that run."
)
SEEN = " `filtered` was trained on text of `es`, so the model without the adapters has seen it."


def test_a_record_is_read_as_written(tmp_path):
    assert read_adapted(tmp_path) is None
    write_adapted(tmp_path, RECORD)
    assert read_adapted(tmp_path) == RECORD


def test_options_and_source_are_in_the_sentence_and_whether_the_base_has_seen_the_domain():
    assert described_adapters(RECORD) == SENTENCE
    assert described_adapters(RECORD | {"seen": True}) == SENTENCE + SEEN


def test_report_and_evaluation_show_it():
    assert cautions({"adapted": RECORD}) == [SENTENCE]


def test_a_loss_on_retained_data_is_blamed_on_the_adapters():
    losses = {"full": {"en": 3.2}, "without es": {"en": 3.0}}
    (_, caution) = cautions({"adapted": RECORD, "losses": losses, "true_labels": {"en": "retain"}})
    assert caution.startswith("The adapters make the model worse on retained data, by 0.20 nats on en; train them with")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"domain": "es"}'])
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=r"adapted\.json is damaged \(.*\); adapt the source again"):
        read_adapted(tmp_path)
