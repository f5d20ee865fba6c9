"""What opens is what was written; anything else is an error that names the file."""

import json
import shutil

import numpy as np
import pytest
from corpora import build, mixed_records, record, texts

from sgtm.data.store import DOCUMENT, DOCUMENTS, LOCK, MANIFEST, SPANS, Corpus, StoredFile, token_dtype
from sgtm.files import sha256_of
from sgtm.masking.labels import LabelSpace


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Corpus:
    records = [*mixed_records(20), record(999, spans=[[2, 6, "es"]])]
    return build(tmp_path_factory.mktemp("store") / "corpus", records, shard_tokens=100)


@pytest.fixture
def folder(prepared, tmp_path):
    shutil.copytree(prepared.path, tmp_path / "copy")
    return tmp_path / "copy"


def test_what_was_written_is_read(prepared):
    assert texts(prepared) == [r["text"] for r in [*mixed_records(20), record(999)]]
    assert len(prepared.manifest.shards) > 5
    assert all(prepared.manifest.files[shard].bytes <= 200 for shard in prepared.manifest.shards)
    counts = prepared.manifest.counts
    for split in prepared.manifest.splits:
        for category in prepared.categories:
            documents = prepared.select(split, category)
            assert counts[split][category].documents == len(documents)
            assert counts[split][category].tokens == prepared.documents["length"][documents].sum()
    assert len(np.unique(prepared.documents["id"])) == len(prepared.documents)
    assert prepared.tokens(0, 2, 5).tolist() == prepared.tokens(0)[2:5].tolist()
    assert len(prepared.tokens(0, 0, 0)) == 0
    for array in (prepared.documents, prepared.spans, prepared.tokens(0)):
        assert isinstance(array, np.memmap) and array.mode == "r"
    assert prepared.tokens(0).dtype == np.dtype("<u2")


def test_fingerprints_are_equal_for_equal_corpora_alone(prepared, folder):
    assert Corpus.open(folder).fingerprint == prepared.fingerprint
    rewrite(folder, SPANS, np.load(folder / SPANS)[:0])
    assert Corpus.open(folder).fingerprint != prepared.fingerprint


def test_ids_depend_on_the_text_alone(prepared, tmp_path):
    other = build(tmp_path / "other", [record(0), *mixed_records(20)[:3]])
    ids = dict(zip(texts(prepared), prepared.documents["id"].tolist(), strict=True))
    assert [ids[text] for text in texts(other)[1:]] == other.documents["id"].tolist()[1:]


def test_labels_are_names_until_a_config_gives_them_numbers(prepared):
    assert prepared.label_of_category(LabelSpace(("bio", "es"))).tolist() == [1, 3, 0]
    with pytest.raises(ValueError, match=r"documents labelled forget:es, but masking\.domains is \['bio'\]"):
        prepared.label_of_category(LabelSpace(("bio",)))


def test_unknown_names_list_the_known(prepared):
    with pytest.raises(ValueError, match="no split 'dev'; its splits are test, train"):
        prepared.select("dev")
    with pytest.raises(ValueError, match="no category 'fr'; its categories are en, es, web"):
        prepared.select("test", "fr")


@pytest.mark.parametrize(("vocab", "dtype"), [(65535, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_the_smallest_type_that_holds_every_id(vocab, dtype):
    assert token_dtype(vocab) == np.dtype(dtype)


@pytest.mark.parametrize("name", ["shards/00002.bin", DOCUMENTS, SPANS, "tokenizer/tokenizer.json"])
def test_a_changed_missing_or_truncated_file_is_named(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"{name} was changed: its SHA-256"):
        Corpus.open(folder)
    (folder / name).write_bytes(data[:-1])
    for verify in ("hashes", "sizes"):
        with pytest.raises(ValueError, match=rf"{name} has {len(data) - 1} bytes instead of {len(data)}; copy or"):
            Corpus.open(folder, verify)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        Corpus.open(folder)


def test_a_folder_without_manifest_or_none_at_all(folder):
    (folder / MANIFEST).unlink()
    with pytest.raises(
        ValueError, match=r"copy is not finished: .*interrupted.*; run the same command again to resume: .*--out .*copy"
    ):
        Corpus.open(folder)
    (folder / LOCK).unlink()
    with pytest.raises(ValueError, match=r"copy is not a corpus \(no manifest\.json in it\); `sgtm prepare DATA"):
        Corpus.open(folder)
    with pytest.raises(
        ValueError,
        match=r"^data\.path \S+spans\.npy is a file; it takes a folder written by: sgtm prepare \S+",
    ):
        Corpus.open(folder / SPANS)
    with pytest.raises(ValueError, match="the folder does not exist"):
        Corpus.open(folder / "nowhere")


def test_another_format_or_a_damaged_manifest(folder):
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**content, "format": 7}))
    with pytest.raises(ValueError, match=r"manifest\.json has format 7, this version reads format 1"):
        Corpus.open(folder)
    for damaged in (json.dumps(content)[:-40], json.dumps({**content, "eos_id": "x"}), "[]", ""):
        (folder / MANIFEST).write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
            Corpus.open(folder)


def rewrite(folder, name, array):
    """Replaces an index and its hash, as a faulty writer would."""
    np.save(folder / name, array)
    content = json.loads((folder / MANIFEST).read_text())
    stored = StoredFile(bytes=(folder / name).stat().st_size, sha256=sha256_of(folder / name))
    content["files"][name] = stored.model_dump()
    (folder / MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("column", "value"),
    [("offset", 10**6), ("offset", -1), ("length", 10**6), ("length", 0), ("shard", 999), ("shard", -1),
     ("category", 3), ("category", -1), ("split", 2), ("split", -1)],
)  # fmt: skip
def test_an_index_that_points_outside_is_refused(folder, column, value):
    documents = np.load(folder / DOCUMENTS)
    documents[column][1] = value
    rewrite(folder, DOCUMENTS, documents)
    with pytest.raises(ValueError, match=r"documents\.npy does not fit the shards and the manifest"):
        Corpus.open(folder)


@pytest.mark.parametrize("last", [False, True])
def test_a_document_that_ends_a_token_behind_its_shard_is_refused(folder, last):
    documents = np.load(folder / DOCUMENTS)
    document = len(documents) - 1 if last else np.flatnonzero(np.diff(documents["shard"]))[0]
    documents["length"][document] += 1
    rewrite(folder, DOCUMENTS, documents)
    with pytest.raises(ValueError, match=r"documents\.npy "):
        Corpus.open(folder)


def test_an_index_of_another_kind_is_refused(folder):
    rewrite(folder, DOCUMENTS, np.load(folder / DOCUMENTS)[:-1])
    with pytest.raises(ValueError, match=r"documents\.npy does not fit"):
        Corpus.open(folder)
    rewrite(folder, DOCUMENTS, np.zeros(4))
    with pytest.raises(ValueError, match=r"documents\.npy holds float64"):
        Corpus.open(folder)


@pytest.mark.parametrize(
    ("column", "value"),
    [("document", 999), ("document", -1), ("end", 99), ("start", 6), ("start", -1), ("category", 5), ("category", -1)],
)
def test_a_span_that_points_outside_is_refused(folder, column, value):
    spans = np.load(folder / SPANS)
    assert len(spans) == 1
    spans[column][0] = value
    rewrite(folder, SPANS, spans)
    with pytest.raises(ValueError, match=r"spans\.npy points outside its documents"):
        Corpus.open(folder)


def test_the_index_is_small(prepared):
    assert DOCUMENT.itemsize <= 32
