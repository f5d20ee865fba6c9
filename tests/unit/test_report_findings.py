"""What page and terminal say of an evaluation: headline, sizes, standard errors, warnings, and which one it is."""

from __future__ import annotations

import io
import json
import math
import re

import pytest
from corpora import build, record
from pages import CONFIG, SUMMARY, Page, page_without_figures, write_run
from rich.console import Console

from sgtm.report import print_summary, write_report
from sgtm.report.findings import localisation, loss_rows, sentences
from sgtm.report.record import read_record


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path)


def test_headline_says_what_happened(run):
    first, second = sentences(read_record(run))
    assert first == "Removing `es` raises the loss on es by 3.21 nats, on en by 0.02 and lowers it on fr by 0.10."
    assert second == "Removing `es` and `fr` raises the loss on es by 3.25 nats, on fr by 2.75 and on en by 0.08."
    assert "Removing es raises the loss on es by 3.21 nats" in page_without_figures(run).text


def many_categories(**more) -> dict:
    """Three retain categories of 1,000, 9,000 and 740 tokens, two unlabeled ones, and Spanish."""
    changes = {"es": 1.0, "a": 0.30, "b": -0.10, "tiny": 9.0, "u": 0.5, "v": 0.7}
    tokens = {"es": 5000, "a": 1000, "b": 9000, "tiny": 740, "u": 2000, "v": 2000}
    true = {"es": "forget:es", "u": "unlabeled", "v": "unlabeled"} | dict.fromkeys(("a", "b", "tiny"), "retain")
    losses = {"full": dict.fromkeys(changes, 2.0), "without es": {c: 2.0 + by for c, by in changes.items()}}
    measured = {category: {"documents": 9, "tokens": n} for category, n in tokens.items()}
    return {"losses": losses, "true_labels": true, "measured": measured, **more}


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


def test_a_small_test_set_is_grey_on_page_and_terminal(run):
    (run / "summary.json").write_text(json.dumps(many_categories()))
    page = page_without_figures(run)
    assert page.source.count('<tr class="small">') == 1
    assert [row[:3] for row in page.rows[1:4]] == [
        ["a", "retain", "1,000"], ["b", "retain", "9,000"], ["tiny", "retain", "740"],
    ]  # fmt: skip
    said = "In grey: tiny (740); fewer than 1,000 tokens were measured, so these losses are not reliable."
    assert said in page.text
    console = Console(width=200, record=True, file=io.StringIO(), force_terminal=True)
    print_summary(many_categories(), console)
    text = console.export_text(styles=True)
    assert said in text and re.search(r"\x1b\[2mtiny", text) and not re.search(r"\x1b\[2ma ", text)


def test_sizes_of_an_older_record_are_those_of_the_split(run):
    """Where all of it was measured; of a part only the evaluation would know."""
    losses, true = {"full": {"en": 3.0}}, {"en": "retain"}
    old = {"losses": losses, "true_labels": true, "split": "test", "counts": {"test": {"en": {"tokens": 740}}}}
    for sequences, tokens in ((None, 740), (8, None)):
        (row,) = loss_rows({**old, "sequences": sequences})
        assert (row.tokens, row.small) == (tokens, tokens is not None)
        (run / "summary.json").write_text(json.dumps({**old, "sequences": sequences}))
        assert ("In grey: en (740)" in page_without_figures(run).text) == row.small


def test_page_and_terminal_count_the_measured_tokens(run):
    """A token less than the split has, whose first one is not predicted; of the other splits those that are there."""
    measured = {"en": {"documents": 9, "tokens": 8487}}
    counts = {"train": {"en": {"tokens": 70001}}, "test": {"en": {"tokens": 8488}}}
    summary = {"losses": {"full": {"en": 3.0}}, "true_labels": {"en": "retain"}, "measured": measured}
    summary |= {"counts": counts, "split": "test", "sequences": None}
    (run / "summary.json").write_text(json.dumps(summary))
    page = page_without_figures(run)
    assert page.rows[0][2] == "tokens, measured" and page.rows[1][2] == "8,487"
    console = Console(width=80, record=True, file=io.StringIO())
    print_summary(summary, console)
    text = console.export_text()
    assert re.search(r"tokens of +train +test, measured *\n.*\n *en +70,001 +8,487", text) and "8,488" not in text


def test_losses_carry_their_standard_errors(run):
    errors = {"full": {"es": 0.0123}, "without es": {"es": 0.05, "en": 0.00002}}
    summary = {**SUMMARY, "errors": errors, "difference_errors": {"without es": {"es": 0.0449}}}
    (run / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(run))
    assert page.rows[1][2:5] == ["3.123", "3.141 ± 0.001", "+0.018"]
    assert page.rows[2][2:5] == ["3.346 ± 0.012", "6.555 ± 0.050", "+3.209 ± 0.045"]
    assert "+3.209 ± 0.045 without es" in page.source
    console = Console(width=80, record=True, file=io.StringIO())
    print_summary({**summary, "baselines": {"unmasked": {"es": 0.0}, "filtered": {"es": 0.0}}}, console)
    text = console.export_text()
    assert re.search(r"es +forget:es +3\.346±0\.012 +6\.555 +\+3\.209±0\.045 +0\.000 +0\.000", text)
    assert "standard error over documents" in text and "…" not in text


WORSE = {"full": {"en": 3.20, "es": 3.0}, "without es": {"en": 3.14, "es": 6.0}}


@pytest.mark.parametrize(
    ("share", "error", "said"),
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
def test_a_full_model_that_is_worse_on_retained_data_than_its_ablated_one(run, share, error, said):
    summary = {"losses": WORSE, "true_labels": SUMMARY["true_labels"]}
    if share is not None:
        summary |= {"retain_with_group": {"es": share}, "difference_errors": {"without es": {"en": error}}}
    (run / "summary.json").write_text(json.dumps(summary))
    page = page_without_figures(run).text
    console = Console(width=300, record=True, file=io.StringIO())
    print_summary(read_record(run).summary, console)
    for text in (page, console.export_text()):
        assert ("The full model is worse on retained data than the model without es" in text) == (said is not None)
        assert said is None or said in text


def test_what_good_gradient_norms_look_like_is_said(run):
    page = Page(write_report(run))
    assert "Good: in each row the framed cell, the label's own group, is by far the largest." in page.text
    assert "forget:es data: 300 times as strong on es as on retain." in page.text
    norms = {"retain": {"retain": 0.02, "es": 0.005}, "unlabeled": {"retain": 1, "es": 1}, "forget:es": {"es": 1.0}}
    assert localisation({"gradient_norms": norms}) == ["retain data: 4 times as strong on retain as on es."]


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


@pytest.mark.parametrize("steps", [None, 60], ids=["no summary", "outdated"])
def test_what_training_has_evaluated_is_shown(run, steps):
    """Where nothing has been measured later; true labels of a line without them are those of the corpus."""
    sample = {"measured": {"en": {"documents": 3, "tokens": 740}}, "errors": {"full": {"en": 0.5}}}
    last = {
        "kind": "eval",
        "step": 90,
        "losses": {"full": {"en": 3.0, "es": None}, "without es": {"en": 2.5, "es": 5.0}},
    }
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**last, **sample, "true_labels": {"en": "retain", "es": "forget:es"}}) + "\n")
    (run / "summary.json").unlink()
    if steps:
        (run / "summary.json").write_text(json.dumps({**SUMMARY, "steps": steps}))
    page = page_without_figures(run)
    assert page.rows[1][:3] == ["en", "retain", "740"] and page.rows[1][3:5] == ["3.000 ± 0.500", "2.500"]
    assert page.rows[2][3] == "nan" and "makes the loss infinite or undefined on es" in page.text
    said = "These losses are of the evaluation in training after step 90, on up to 64 sequences of each category; "
    assert said in page.text and ("summary.json is of step 60." in page.text) == (steps is not None)
    (run / "summary.json").write_text(json.dumps({**SUMMARY, "steps": 90}))
    assert "in training after step" not in page_without_figures(run).text


def test_an_older_evaluation_in_training_has_its_true_labels_from_the_corpus(run, tmp_path):
    (run / "summary.json").unlink()
    corpus = build(tmp_path / "corpus", [record(n, category) for n in range(3) for category in ("en", "es", "web")])
    assert {row.true_label for row in loss_rows(read_record(run).summary)} == {""}, "no corpus there"
    (run / "config.yaml").write_text(CONFIG + f"data: {{path: {corpus.path}}}\n")
    found = {row.category: row.true_label for row in loss_rows(read_record(run).summary)}
    assert found == {"en": "retain", "es": "forget:es"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"of_steps": 200}, "after step 90 of 200"),
        ({"sequences": 8, "split": "train"}, "on split train, on up to 8 sequences of each category"),
    ],
)
def test_an_evaluation_of_a_part_is_said(run, more, said):
    (run / "summary.json").write_text(json.dumps({**SUMMARY, **more}))
    assert f"These losses were measured {said}." in page_without_figures(run).text
