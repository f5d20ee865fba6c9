"""What page and terminal say of an evaluation: headline, sizes, standard errors, warnings, and which one it is."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import pytest
from many_domains import summary
from pages import SUMMARY, Page, many_categories, page_without_figures, write_run
from rich.console import Console

from sgtm.report import print_summary, write_report
from sgtm.report.findings import cautions, localisation, loss_rows, sentences, set_rows
from sgtm.report.record import RunRecord, read_record


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path)


def test_headline_says_what_happened(run):
    first, second = sentences(read_record(run))
    assert first == "Removing `es` raises the loss on es by 3.21 nats, on en by 0.02 and lowers it on fr by 0.10."
    assert second == "Removing `es` and `fr` raises the loss on es by 3.25 nats, on fr by 2.75 and on en by 0.08."
    assert "Removing es raises the loss on es by 3.21 nats" in page_without_figures(run).text


def test_many_kept_categories_are_averaged_by_true_label_and_tokens(run):
    """No mean of retained and unlabeled data, the one that fell is named, and 740 tokens count for nothing."""
    (run / "summary.json").write_text(json.dumps(many_categories()))
    (sentence,) = sentences(read_record(run))
    assert sentence == (
        "Removing `es` raises the loss on es by 1.00 nats, lowers it on the 2 retain categories by 0.06 (−0.10 on b to "
        "+0.30 on a) and raises it on the 2 unlabeled categories by 0.60 (+0.50 on u to +0.70 on v)."
    )


def test_categories_of_unknown_size_are_averaged_alike_and_the_headline_says_so(run):
    summary = many_categories()
    del summary["measured"]
    (run / "summary.json").write_text(json.dumps(summary))
    (sentence,) = sentences(read_record(run))
    assert "on the 3 retain categories by 3.07 (a mean that weighs all alike; −0.10 on b to +9.00 on tiny)" in sentence


def test_sizes_of_an_older_record_are_those_of_the_split(run):
    """Where all of it was measured; of a part only the evaluation would know."""
    losses, true = {"full": {"en": 3.0}}, {"en": "retain"}
    old = {"losses": losses, "true_labels": true, "split": "test", "counts": {"test": {"en": {"tokens": 740}}}}
    for sequences, tokens in ((None, 740), (8, None)):
        (row,) = loss_rows({**old, "sequences": sequences})
        assert (row.tokens, row.small) == (tokens, tokens is not None)
        (run / "summary.json").write_text(json.dumps({**old, "sequences": sequences}))
        assert ("In grey: en (740)" in page_without_figures(run).text) == row.small


WORSE = {"full": {"en": 3.20, "es": 3.0}, "without es": {"en": 3.14, "es": 6.0}}


@pytest.mark.parametrize(
    ("share", "error", "finding"),
    [
        (
            0,
            0.01,
            "0.06 nats on en: no retain data are trained with the group es running. Remedy: a share of the retain",
        ),
        (0.2, 0.01, "only 20% of the retain data are trained with the group es running. Remedy: a larger share of the"),
        (1, 0.01, "although all retain data are trained with the group es running"),
        (0, 0.04, None),
        (None, None, "no retain data are trained with the group es running"),
    ],
    ids=["never", "a fifth", "always", "by chance", "an older record"],
)
def test_a_full_model_that_is_worse_on_retained_data_than_its_ablated_one(run, share, error, finding):
    summary = {"losses": WORSE, "true_labels": SUMMARY["true_labels"]}
    if share is not None:
        summary |= {"retain_with_group": {"es": share}, "difference_errors": {"without es": {"en": error}}}
    (run / "summary.json").write_text(json.dumps(summary))
    page = page_without_figures(run).text
    console = Console(width=300, record=True, file=io.StringIO())
    print_summary(read_record(run).summary, console)
    for text in (page, console.export_text()):
        assert ("The full model is worse on retained data than the model without es" in text) == (finding is not None)
        assert finding is None or finding in text


def test_a_direction_that_makes_the_full_model_worse_is_named(run):
    """And no group, whether the run has groups or not."""
    for strength, named in ((2.0, True), (0.0, False)):
        steering = {"domain": "es", "layer": 0, "strength": strength, "sha256": "0"}
        summary = {"losses": WORSE, "true_labels": SUMMARY["true_labels"], "steering": steering}
        (run / "summary.json").write_text(json.dumps(summary))
        text = page_without_figures(run).text
        assert ("The direction of es, which is added to every token, makes the model worse" in text) == named
        assert ("closer to 0 than 2 adds less" in text, "with the group es running" in text) == (named, not named)


def test_gradient_norms_are_shown_without_a_verdict(run):
    """The recipe dual localises a domain whose gradient is stronger on retain than on its own group."""
    page = Page(write_report(run))
    assert "It does not show what a group has learned" in page.text
    assert not re.search(r"\bGood\b|not localised", page.text)
    assert "The gradient of forget:es data is 300 times as strong on es as on retain." in page.text
    norms = {"retain": {"retain": 0.02, "es": 0.005}, "unlabeled": {"retain": 1, "es": 1}, "forget:es": {"es": 1.0}}
    assert localisation({"gradient_norms": norms}) == [
        "The gradient of retain data is 4 times as strong on retain as on es."
    ]


def test_no_effect_and_no_number_are_said(run):
    losses = {"full": {"en": 3.0, "es": 3.0}, "without es": {"en": 3.004, "es": math.nan}}
    (run / "summary.json").write_text(json.dumps({"losses": losses, "true_labels": SUMMARY["true_labels"]}))
    (sentence,) = sentences(read_record(run))
    assert sentence == "Removing `es` makes the loss infinite or undefined on es and leaves it unchanged on en."
    write_report(run)


def test_a_run_that_is_not_evaluated(run):
    (run / "summary.json").unlink()
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"eval"' not in line]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = page_without_figures(run)
    assert "Not evaluated yet: 90 of 90 steps trained" in page.text and "has not been evaluated" in page.text


@pytest.mark.parametrize(
    ("more", "scope"),
    [
        ({"of_steps": 200}, "after step 90 of 200"),
        ({"sequences": 8, "split": "train"}, "on split train, on up to 8 sequences of each category"),
    ],
)
def test_an_evaluation_of_a_part_is_said(run, more, scope):
    (run / "summary.json").write_text(json.dumps({**SUMMARY, **more}))
    assert f"These losses were measured {scope}." in page_without_figures(run).text


@pytest.mark.parametrize("count", [4, 20])
def test_sentences_and_cautions_do_not_grow_with_the_domains(count):
    of = summary(count)
    for domain in range(1, count + 1):
        of["losses"][f"without d{domain}"]["en"] -= 0.5
    record = RunRecord(Path("runs/many"), None, "", [], [], of, [])
    headline, every = sentences(record)[:2]
    assert headline.startswith(f"Removing one of {count} domains changes the loss on its own data by ")
    assert every.startswith(f"Without all {count} domains: ")
    first, others = cautions(of)
    assert first.startswith("The full model is worse on retained data than the model without `d1`, by 0.49 nats on en")
    assert others == f"So it is with {count - 1} other domains."


@pytest.mark.parametrize(("full", "error", "named"), [(2.1, 0.01, True), (2.04, 0.01, False), (2.1, 0.2, False)])
def test_groups_that_disturb_one_another_are_named(full, error, named):
    losses = {
        "full": {"en": 1.0, "d1": full, "d2": 2.0},
        "without d1": {"en": 1.0, "d1": 9.0, "d2": 2.0},
        "without d2": {"en": 1.0, "d1": 2.0, "d2": 1.0},  # on its own data a fall is no disturbance by another
    }
    true = {"en": "retain", "d1": "forget:d1", "d2": "forget:d2"}
    errors = {condition: dict.fromkeys(true, error) for condition in losses if condition != "full"}
    lines = cautions({"losses": losses, "true_labels": true, "difference_errors": errors})
    if not named:
        assert lines == []
        return
    (line,) = lines
    assert line.startswith(
        "The full model is worse on a domain's data than the model without another domain, by up to 0.10 nats on d1: "
    )
    assert "Remedy: train a larger share of each row of `data.channel` as `unlabeled`" in line


def test_set_rows_are_for_more_than_three_conditions():
    assert set_rows(SUMMARY) == [] and set_rows(summary(2)) == []
    rows = set_rows(summary(3))
    assert [row.condition for row in rows] == ["full", "without d1", "without d2", "without d3", "without d1,d2,d3"]
    assert list(rows[0].losses) == ["retain", "forget:d1", "forget:d2", "forget:d3"] and rows[0].changes == {}
    assert rows[-1].meant == ("forget:d1", "forget:d2", "forget:d3")
    assert rows[2].changes["forget:d2"] == pytest.approx(0.2)


def test_a_domain_at_a_strength_has_a_sentence():
    losses = {"full": {"es": 2.0, "en": 1.0}, "with es at 0.5": {"es": 3.0, "en": 1.0}}
    of = {"losses": losses, "true_labels": {"es": "forget:es", "en": "retain"}}
    (sentence,) = sentences(RunRecord(Path("runs/r"), None, "", [], [], of, []))
    assert sentence == "The model with es at 0.5 raises the loss on es by 1.00 nats and leaves it unchanged on en."
