"""`prepare`: every input format round-trips; every kind of bad input is an error that says where."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pytest
import zstandard
from corpora import BYTES, texts, write_jsonl
from pyarrow import parquet

from sgtm.data import readers
from sgtm.data.discover import open_sources
from sgtm.data.prepare import prepare
from sgtm.data.rules import Rules
from sgtm.data.store import Corpus

RULES = {"split": {"constant": "train"}, "labels": {"en": "retain", "es": "forget:es", "fr": "drop"}}
RECORDS = [
    {"text": "The old mill.\nTwo lines.", "category": "en"},
    {"text": "El niño comió ¡doce! 🍒", "category": "es"},
    {"text": "  ", "category": "en"},
    {"text": "Laissé de côté.", "category": "fr"},
    {"text": "<|endoftext|> is text here", "category": "en"},
]
KEPT = [RECORDS[0]["text"], RECORDS[1]["text"], RECORDS[4]["text"]]


def prepared(tmp_path, *sources, rules=RULES, **options) -> Corpus:
    options = {"vocab_size": BYTES, "workers": 1, **options}
    return prepare(open_sources(sources), Rules.model_validate(rules), "train", tmp_path / "out", **options)


def jsonl_bytes(records=RECORDS) -> bytes:
    return "".join(json.dumps(fields, ensure_ascii=False) + "\n" for fields in records).encode()


def compress(data: bytes, suffix: str) -> bytes:
    if suffix == ".zst":  # two frames, as parallel compressors write them
        half = len(data) // 2
        return b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))
    return {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix](data)


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("block_bytes", [50, 10**6])
def test_jsonl(tmp_path, monkeypatch, suffix, block_bytes):
    monkeypatch.setattr(readers, "BLOCK_BYTES", block_bytes)
    source = tmp_path / f"a.jsonl{suffix}"
    source.write_bytes(compress(jsonl_bytes() + b"\n", suffix))
    corpus = prepared(tmp_path, source)
    assert texts(corpus) == KEPT
    assert (corpus.manifest.empty, corpus.manifest.dropped) == (1, 1)
    assert [list(corpus.categories)[c] for c in corpus.documents["category"]] == ["en", "es", "en"]
    assert corpus.categories == {"en": "retain", "es": "forget:es"}


def test_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 100)
    parquet.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet", row_group_size=2)
    assert texts(prepared(tmp_path, tmp_path / "a.parquet")) == KEPT


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    parts = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(RECORDS), "test": datasets.Dataset.from_list(RECORDS[:1])}
    )
    parts.save_to_disk(str(tmp_path / "both"))
    corpus = prepared(tmp_path, tmp_path / "both", rules={**RULES, "split": {"field": "split"}})
    assert texts(corpus) == [*KEPT, KEPT[0]]
    assert [corpus.manifest.splits[s] for s in corpus.documents["split"]] == ["train"] * 3 + ["test"]
    rules = Rules.model_validate(RULES)
    one = prepare(open_sources([tmp_path / "both/train"]), rules, "train", tmp_path / "b", vocab_size=BYTES, workers=1)
    assert texts(one) == KEPT


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"splits": "train"}', '{"splits": [1]}'])
def test_a_damaged_list_of_splits_is_named(tmp_path, content):
    (tmp_path / "dataset_dict.json").write_text(content)
    with pytest.raises(ValueError, match=r"dataset_dict\.json is damaged \(.+\); expected"):
        open_sources([tmp_path])


def test_text_folders(tmp_path):
    for category, name, text in [("en", "a", "first"), ("en", "b", "second"), ("es", "a", "tercero"), ("es", "z", "")]:
        (tmp_path / "books" / category).mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / category / f"{name}.txt").write_text(text)
    corpus = prepared(tmp_path, tmp_path / "books")
    assert texts(corpus) == ["first", "second", "tercero"]
    assert [list(corpus.categories)[c] for c in corpus.documents["category"]] == ["en", "en", "es"]


def test_the_rules_see_each_files_own_path(tmp_path):
    (tmp_path / "en").mkdir()
    for name in ("train", "test", "train2"):
        (tmp_path / "en" / f"{name}.txt").write_text(name)
    corpus = prepared(tmp_path, tmp_path / "en", rules={**RULES, "split": {"path": r"/(train|test)\d?\.txt$"}})
    splits = {text: corpus.manifest.splits[s] for text, s in zip(texts(corpus), corpus.documents["split"], strict=True)}
    assert splits == {"train": "train", "test": "test", "train2": "train"}


def test_the_match_nearest_to_the_file_name_counts(tmp_path):
    (tmp_path / "for_test").mkdir()
    source = write_jsonl(tmp_path / "for_test/en.train.jsonl", RECORDS[:2])
    rules = {**RULES, "split": {"path": "(train|test)"}}
    loaded = prepare(
        open_sources([source]), Rules.model_validate(rules), tokenizer_of(tmp_path), tmp_path / "out", workers=1
    )
    assert loaded.manifest.splits == ["train"]


def tokenizer_of(tmp_path):
    source = write_jsonl(tmp_path / "other.jsonl", RECORDS)
    prepare(open_sources([source]), Rules.model_validate(RULES), "train", tmp_path / "b", vocab_size=BYTES, workers=1)
    return tmp_path / "b/tokenizer"


def test_hash_split_is_a_share_and_keeps_keys_together(tmp_path):
    records = [{"text": f"text {i}", "category": "en", "book": f"b{i // 4}"} for i in range(2000)]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    corpus = prepared(tmp_path, source, rules={**RULES, "split": {"hash": {"test": 0.1}, "by": "book"}})
    split = corpus.documents["split"].reshape(-1, 4)
    assert (split == split[:, :1]).all()
    assert 0.05 < (split == corpus.manifest.splits.index("test")).mean() < 0.15


def test_spans_become_the_tokens_they_touch(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 10)
    text = "safe ñandú then danger here"
    start = text.index("danger")
    record = {"text": text, "category": "en", "spans": [[start, start + 6, "es"]]}
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "category": "en", "spans": []}, record])
    corpus = prepared(tmp_path, source, rules={**RULES, "spans": "spans"})
    (span,) = corpus.spans
    tokens = corpus.tokens(int(span["document"]), int(span["start"]), int(span["end"]))
    assert corpus.tokenizer.decode(tokens.tolist()) == "danger"
    assert (span["document"], list(corpus.categories)[span["category"]]) == (1, "es")


GOOD = json.dumps({"text": "good", "category": "en"}).encode() + b"\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x", "category": "it"}\n', r"a.jsonl:2: unknown category 'it'; labels has en, es, fr"),
        (b'{"text": "x", "category": "En"}\n', r"a.jsonl:2: unknown category 'En' \(did you mean en\?\)"),
        (b'{"text": "x", "category": "en"\n', r"a.jsonl:2: not JSON"),
        (b'{"text": "\xff", "category": "en"}\n', r"a.jsonl:2: not UTF-8 at byte 10 of the line"),
        (b'{"txt": "x", "category": "en"}\n', r"a.jsonl:2: no field 'text' .*txt\?\); the record has txt, category"),
        (b'{"text": 3, "category": "en"}\n', r"a.jsonl:2: field 'text' holds int, expected text"),
        (b'{"text": "x", "category": null}\n', r"a.jsonl:2: field 'category' holds null, expected text"),
        (b'{"text": "x", "category": ["en"]}\n', r"a.jsonl:2: field 'category' holds list, expected text"),
        (b'["text"]\n', r"a.jsonl:2: expected a JSON object, got list"),
        (b'{"a": %s}\n' % (b"[" * 100_000), r"a.jsonl:2: not JSON that can be read: nested too deeply"),
        (b'{"a": %s}\n' % (b"7" * 5000), r"a.jsonl:2: not JSON that can be read: .*4300 digits"),
        (b'{"text": "\\ud800", "category": "en"}\n', r"a.jsonl:2: the text has half a surrogate pair"),
        (b'{"text": "%s", "category": "en"}\n' % (b"x" * 50), r":2: a document of 51 tokens is longer than a shard"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(GOOD + line)
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, tmp_path / "a.jsonl", shard_tokens=40)
    with pytest.raises(ValueError, match=r"out is not finished.*ended with an error.*again"):
        Corpus.open(tmp_path / "out")


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[0, 9, "es"]], "outside the text of 4 characters"),
        ([[2, 2, "es"]], "is empty"),
        ([[0, 2, "es"], [1, 3, "es"]], "overlaps"),
        ([[0, 2, "it"]], "unknown category 'it'"),
        ([[0, 2, "fr"]], "cannot be dropped"),
        ([3], "spans must be"),
        ([[0.5, 2, "es"]], r"in whole numbers, got \[\[0.5, 2, 'es'\]\]"),
        ([[0, 2.0, "es"]], "in whole numbers"),
        ([[False, 2, "es"]], "in whole numbers"),
        ([[0, float("inf"), "es"]], r"in whole numbers, got \[\[0, inf, 'es'\]\]"),
    ],
)
def test_bad_spans_are_named(tmp_path, spans, message):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "text", "category": "en", "spans": spans}])
    with pytest.raises(ValueError, match=rf"a.jsonl:1: .*{message}"):
        prepared(tmp_path, source, rules={**RULES, "spans": "spans"})


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_truncated_or_damaged_file_is_named(tmp_path, suffix):
    whole = compress(jsonl_bytes([{"text": f"text {i} {i**5}", "category": "en"} for i in range(3000)]), suffix)
    source = tmp_path / f"a.jsonl{suffix}"
    for cut in (len(whole) - 3, len(whole) * 3 // 4, 40):
        source.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=rf"a\.jsonl{suffix} is truncated"):
            prepared(tmp_path, source)
    source.write_bytes(whole[: len(whole) // 2] + b"\0\1\2\3" * 9 + whole[len(whole) // 2 + 36 :])
    with pytest.raises(ValueError, match=rf"a\.jsonl{suffix}"):
        prepared(tmp_path, source)


def test_a_truncated_parquet_file_is_named(tmp_path):
    parquet.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"a\.parquet is damaged or truncated"):
        prepared(tmp_path, tmp_path / "a.parquet")


def test_a_missing_parquet_column_lists_those_there_are(tmp_path):
    parquet.write_table(pa.Table.from_pylist([{"body": "x", "category": "en", "n": 1}]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 0: no field 'text'; the record has body, category, n"):
        prepared(tmp_path, tmp_path / "a.parquet")


def test_other_bad_sources(tmp_path):
    (tmp_path / "en").mkdir()
    (tmp_path / "en/a.txt").write_bytes(b"abc\xe9")
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 at byte 3"):
        prepared(tmp_path, tmp_path / "en")
    with pytest.raises(ValueError, match="no such file or folder"):
        open_sources([tmp_path / "none"])
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ValueError, match=r"cannot read .*a\.docx: expected \.txt"):
        open_sources([tmp_path / "a.docx"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="nothing to read"):
        open_sources([tmp_path / "empty"])


def test_only_empty_documents_is_an_error(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": " \n", "category": "en"}])
    with pytest.raises(ValueError, match=r"no document with text is in split train, .* found: none at all"):
        prepared(tmp_path, source)
    folder = tokenizer_of(tmp_path)
    with pytest.raises(ValueError, match="no document has any text: 1 are empty, 0 dropped"):
        prepare(open_sources([source]), Rules.model_validate(RULES), folder, tmp_path / "out", workers=1)


def test_no_training_documents_is_an_error_that_says_where_they_are(tmp_path):
    records = [
        {**fields, "split": name}
        for fields, name in zip(RECORDS, ("training", "training", "test", "dev", "dev"), strict=True)
    ]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    with pytest.raises(ValueError, match=r"split train, .* found: 2 in training, 1 in dev"):
        prepared(tmp_path, source, rules={**RULES, "split": {"field": "split"}})
