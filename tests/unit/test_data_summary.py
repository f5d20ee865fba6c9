"""What `sgtm prepare` prints at its end: the counts, and what is likely a mistake."""

import pytest
import yaml
from corpora import BYTES, SPAN_LABELS, build, record, spanned, write_jsonl

from sgtm.data.prepare import PrepareOptions, run_prepare
from sgtm.data.summary import trained_categories

RULES = {"split": {"field": "split"}, "labels": {"en": "retain", "es": "forget:es"}}


@pytest.fixture
def printed(tmp_path, capsys):
    """Prepares records, or None for the last ones, and returns what was printed: (lines of stdout, warnings)."""

    def run(records, **rules):
        source = tmp_path / "a.jsonl"
        if records is not None:
            write_jsonl(source, records)
        (tmp_path / "rules.yaml").write_text(yaml.safe_dump({**RULES, **rules}, sort_keys=False))
        options = {"vocab_size": BYTES, "workers": 1, "overwrite": True}
        run_prepare(PrepareOptions((source,), tmp_path / "rules.yaml", tmp_path / "out", **options))
        shown, errors = capsys.readouterr()
        warnings = [line for line in errors.splitlines() if line]
        assert all(line.startswith("warning: ") for line in warnings)
        return shown, [line.removeprefix("warning: ") for line in warnings]

    return run


def both_splits(category: str, test_tokens: int, number: int = 0) -> list[dict]:
    """A training document, and a test document of this many tokens, the EOS included."""
    return [record(number, category), record(number + 1, category, test_tokens - 1, "test")]


GOOD = [*both_splits("en", 1000), *both_splits("es", 1500)]


def test_the_counts(printed):
    records = [*GOOD, {"text": " ", "category": "en", "split": "train"}, record(9, "fr")]
    shown, _ = printed(records, labels={**RULES["labels"], "fr": "drop"})
    assert "forget:es" in shown and "1 shard; 1 empty and 1 dropped document left out" in " ".join(shown.split())


def test_a_finished_corpus_says_that_nothing_was_done(printed, tmp_path):
    done = f"{tmp_path / 'out'} is complete already; nothing was done\n"
    assert done not in printed(GOOD)[0]
    again = printed(None)[0]
    assert (
        again.splitlines(keepends=True)[:2] == ["reading 1 .jsonl\n", done]
        and "tokenizing" not in again
        and "forget:es" in again
    )


def test_nothing_to_warn_of(printed):
    assert printed(GOOD)[1] == []


def test_a_tiny_and_a_missing_test_split(printed):
    remedy = "put more of its documents into the split (rules: split)"
    records = [*both_splits("en", 999), *both_splits("es", 1000), record(7, "fr"), record(8, "de", 2000, "test")]
    assert printed(records, labels={**RULES["labels"], "fr": "retain", "de": "retain"})[1] == [
        f"category en has only 999 tokens in split test: its loss in an evaluation is not reliable; {remedy}",
        "category fr has no document in split test: it has no loss in an evaluation",
        "category de has no document in split train: nothing of it is learned",
    ]


def test_nothing_but_forget_data(printed):
    """Retain data in the test split alone do not count, and unlabeled data do."""
    forget = [*both_splits("es", 1500), record(8, "en", 1000, "test")]
    assert printed(forget)[1] == [
        "nothing in split train is retain or unlabeled: the model without its domains learns next to nothing "
        "(rules: labels)",
        "category en has no document in split train: nothing of it is learned",
    ]
    assert printed(GOOD, labels={"en": "unlabeled", "es": "forget:es"})[1] == []


def test_a_missing_split(printed):
    warnings = printed([record(0), record(1, "es")])[1]
    assert warnings == ["no document is in split test; evaluation needs it (rules: split)"]
    split = {"hash": {"test": 0, "dev": 1e-9}}
    assert printed([record(2), record(3, "es")], split=split)[1] == [
        "no document is in split test; evaluation needs it (rules: split)",
        "split.hash of the rules: no document fell into dev",
    ]


def test_labels_that_matched_nothing(printed):
    labels = {**RULES["labels"], "fr": "retain", "de": "drop"}
    assert printed(GOOD, labels=labels)[1] == ["labels of the rules: no document is of category de, fr"]
    assert printed([*GOOD, record(9, "de")], labels=labels)[1] == ["labels of the rules: no document is of category fr"]


def test_a_category_of_spans_alone_is_matched(printed):
    spanned = [{"spans": [], **fields} for fields in GOOD]
    spanned[0]["spans"] = [[0, 4, "toxin"]]
    assert printed(spanned, spans="spans", labels={**RULES["labels"], "toxin": "forget:bio"})[1] == [
        "category toxin has no document in split test: it has no loss in an evaluation"
    ]


def test_spans_are_counted_by_split_for_their_own_category(printed):
    """A corpus whose documents all have spans."""
    labels = {"en": "retain", "toxin": "forget:bio", "venom": "forget:bio"}
    records = [
        record(0, length=1200, spans=[[0, 5, "toxin"], [6, 10, "toxin"], [20, 21, "venom"]]),
        record(1, length=2000, split="test", spans=[[100, 1300, "toxin"]]),
    ]
    shown, warnings = printed(records, spans="spans", labels=labels)
    rows = [line.replace("│", " ").split() for line in shown.splitlines() if "│" in line]
    assert rows == [
        ["test", "en", "retain", "1", "801", "0", "0"],
        ["test", "toxin", "forget:bio", "1", "1,200", "1", "1,200"],
        ["train", "en", "retain", "1", "1,191", "0", "0"],
        ["train", "toxin", "forget:bio", "1", "9", "2", "9"],
        ["train", "venom", "forget:bio", "1", "1", "1", "1"],
    ]
    assert warnings == [
        "category en has only 801 tokens in split test: its loss in an evaluation is not reliable; put more of its "
        "documents into the split (rules: split)",
        "category venom has no document in split test: it has no loss in an evaluation",
    ]


def test_spans_of_the_test_split_alone_are_not_trained(tmp_path):
    records = [{**spanned(1, "train"), "spans": []}, spanned(1, "test")]
    corpus = build(tmp_path / "corpus", records, SPAN_LABELS)
    assert trained_categories(corpus) == {"web": "retain"}
    assert trained_categories(corpus, "test") == {"web": "retain", "toxin": "forget:es", "rumour": "unlabeled"}
