"""Writing a corpus: where documents lie in the shards, what the index and the manifest say, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from corpora import contents

from sgtm.data.store import DOCUMENT, MANIFEST, SPAN, Corpus, Count
from sgtm.data.writer import CorpusWriter

CATEGORIES = {"en": "retain", "es": "forget:es", "fr": "retain"}


def writer_in(folder: Path, shard_tokens: int = 10, vocab_size: int = 300) -> CorpusWriter:
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer/tokenizer.json").write_text("{}")
    return CorpusWriter(folder, vocab_size, shard_tokens)


def documents(*rows: tuple[int, int, int], first: int = 0) -> np.ndarray:
    """Of rows (length, category, split), with ids from `first` on."""
    array = np.zeros(len(rows), DOCUMENT)
    array["length"], array["category"], array["split"] = zip(*rows, strict=True)
    array["id"] = np.arange(first, first + len(rows))
    return array


ROWS = [(4, 0, 0), (4, 1, 0), (5, 0, 1), (10, 0, 0), (1, 1, 1)]
TOKENS = np.arange(24) + 200


def written(folder: Path, *cuts: int, notes: tuple[str, ...] = ()) -> Corpus:
    """`ROWS`, in calls that end before these documents."""
    writer, ends = writer_in(folder), np.cumsum([0, *(length for length, _, _ in ROWS)])
    for first, last in zip((0, *cuts), (*cuts, len(ROWS)), strict=True):
        spans = np.array([(4 - first, 0, 1, 0)] if first <= 4 < last else [], SPAN)
        spans = np.concatenate([spans, np.array([(1 - first, 1, 3, 0)] if first <= 1 < last else [], SPAN)])
        writer.add(TOKENS[ends[first] : ends[last]], documents(*ROWS[first:last], first=first), spans)
    with pytest.raises(ValueError, match="not a corpus"):
        Corpus.open(folder)
    writer.finish(299, CATEGORIES, ["train", "test"], 2, 3, notes)
    return Corpus.open(folder)


def test_a_document_lies_in_one_shard_after_those_before_it(tmp_path):
    corpus = written(tmp_path / "a")
    assert corpus.documents["shard"].tolist() == [0, 0, 1, 2, 3]
    assert corpus.documents["offset"].tolist() == [0, 4, 0, 0, 0]
    assert [corpus.manifest.files[shard].bytes for shard in corpus.manifest.shards] == [16, 10, 20, 2]
    tokens = [corpus.tokens(document).tolist() for document in range(5)]
    assert [token for each in tokens for token in each] == TOKENS.tolist()
    assert [len(each) for each in tokens] == [length for length, _, _ in ROWS]


def test_the_files_do_not_depend_on_how_documents_are_handed_over(tmp_path):
    expected = contents(written(tmp_path / "a").path)
    for cuts in ((1,), (2, 3), (1, 2, 3, 4)):
        assert contents(written(tmp_path / f"b{len(cuts)}", *cuts).path) == expected


def test_spans_are_of_their_documents_in_order(tmp_path):
    corpus = written(tmp_path / "a", 1, 3)
    assert corpus.spans.tolist() == [(1, 1, 3, 0), (4, 0, 1, 0)]


def test_the_manifest_counts_documents_and_tokens_by_split_and_category(tmp_path):
    manifest = written(tmp_path / "a").manifest
    assert manifest.counts == {
        "train": {"en": Count(documents=2, tokens=14), "es": Count(documents=1, tokens=4)},
        "test": {"en": Count(documents=1, tokens=5), "es": Count(documents=1, tokens=1)},
    }
    assert (manifest.categories, manifest.splits) == (CATEGORIES, ["train", "test"])
    assert (manifest.vocab_size, manifest.eos_id, manifest.shard_tokens) == (300, 299, 10)
    assert (manifest.empty, manifest.dropped) == (2, 3)


def test_a_manifest_without_notes_has_no_key_for_them(tmp_path):
    assert "notes" not in json.loads((written(tmp_path / "a").path / MANIFEST).read_text())
    assert written(tmp_path / "b", notes=("one",)).manifest.notes == ["one"]


def test_a_document_that_fits_no_shard_is_refused_and_one_that_fills_it_is_not(tmp_path):
    writer = writer_in(tmp_path / "a")
    writer.add(np.zeros(10), documents((10, 0, 0)), np.zeros(0, SPAN))
    with pytest.raises(ValueError, match="a document of 11 tokens is longer than a shard; raise --shard-tokens to 11"):
        writer.add(np.zeros(12), documents((1, 0, 0), (11, 0, 0)), np.zeros(0, SPAN))


def test_what_is_handed_over_is_not_changed(tmp_path):
    records, spans = documents((4, 0, 0), (4, 0, 0)), np.array([(0, 1, 2, 0)], SPAN)
    writer = writer_in(tmp_path / "a", shard_tokens=4)
    for _ in range(2):
        writer.add(np.zeros(8), records, spans)
    assert records["shard"].tolist() == [0, 0] and spans["document"].tolist() == [0]
