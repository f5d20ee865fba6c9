"""The folder that `prepare` writes: what is in it already, what may replace it, and what is left alone.

`tests/processes/test_prepare_resume.py` kills the process at every stage.
"""

import hashlib
import json
import shutil

import pytest
from corpora import build, contents, mixed_records

from sgtm.data.folder import (
    BLOCKS,
    JOB,
    REPLACEMENT,
    blocks_of,
    clear,
    folder_to_build,
    locked,
    put_in_place,
    same_job,
    stored_job,
)
from sgtm.data.store import MANIFEST, Corpus

RECORDS = mixed_records(4)


def test_a_finished_corpus_is_only_replaced_when_asked(tmp_path):
    before = contents(build(tmp_path / "out", RECORDS, shard_tokens=100).path)
    assert contents(build(tmp_path / "out", RECORDS, shard_tokens=100).path) == before
    with pytest.raises(ValueError, match=r"prepared from other options \(--shard-tokens\); .*--overwrite"):
        build(tmp_path / "out", RECORDS, shard_tokens=99)
    with pytest.raises(ValueError, match=r"prepared from other inputs; .*--overwrite"):
        build(tmp_path / "out", RECORDS[1:], shard_tokens=100)
    assert contents(tmp_path / "out") == before
    assert build(tmp_path / "out", RECORDS, shard_tokens=99, overwrite=True).manifest.shard_tokens == 99


def test_a_damaged_corpus_is_prepared_again(tmp_path):
    before = contents(build(tmp_path / "out", RECORDS, shard_tokens=100).path)
    (tmp_path / "out/shards/00001.bin").write_bytes(b"")
    assert contents(build(tmp_path / "out", RECORDS, shard_tokens=100).path) == before


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"not empty \(it holds thesis\.tex\)"):
        build(tmp_path / "out", RECORDS)
    assert (tmp_path / "out/thesis.tex").read_text() == "years of work"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"], "it is no corpus that was begun"


def test_a_file_in_the_place_of_the_corpus(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match=r"--out: .*out is a file, but it takes a folder"), locked(tmp_path / "out"):
        pass


def test_the_stored_job_is_that_of_the_folder_or_none(tmp_path):
    assert stored_job(tmp_path) is None
    (tmp_path / JOB).write_text('{"sources": [')
    assert stored_job(tmp_path) is None
    (tmp_path / JOB).write_text('{"sources": [1]}')
    assert stored_job(tmp_path) == {"sources": [1]}


def test_jobs_are_the_same_where_the_order_is_too():
    one = {"labels": {"en": "retain", "es": "forget:es"}}
    assert same_job(one, {"labels": dict(one["labels"])}) and not same_job(None, one)
    assert not same_job(one, {"labels": dict(reversed(one["labels"].items()))})


def test_the_blocks_of_a_job_lie_in_a_folder_named_by_its_hash(tmp_path):
    name = hashlib.sha256(b'{"a": 1}').hexdigest()[:16]
    assert blocks_of(tmp_path, {"a": 1}) == tmp_path / "blocks" / name
    assert blocks_of(tmp_path, {"a": 2}) != blocks_of(tmp_path, {"a": 1})


@pytest.fixture
def finished(tmp_path):
    """A finished corpus, and the job that made it."""
    corpus = build(tmp_path / "out", RECORDS, shard_tokens=100)
    return corpus.path, json.loads((corpus.path / JOB).read_text())


def test_a_finished_corpus_of_the_same_job_is_not_built(finished):
    out, job = finished
    (out / BLOCKS).mkdir()
    assert folder_to_build(out, job, 100, overwrite=False) is None
    assert not (out / BLOCKS).exists(), "what it needs no more has gone"


def test_another_job_is_built_inside_the_corpus_that_it_replaces(finished):
    out, job = finished
    before, other = contents(out), {**job, "sources": ["others"]}
    folder = folder_to_build(out, other, 100, overwrite=True)
    assert folder == out / REPLACEMENT and stored_job(folder) == other and blocks_of(folder, other).is_dir()
    assert contents(out).items() >= before.items() and Corpus.open(out)
    (block := blocks_of(folder, other) / "00000000.npz").touch()
    (half := blocks_of(folder, other) / "00000001.npz.1.tmp").touch()
    assert folder_to_build(out, other, 100, overwrite=True) == folder
    assert block.exists() and not half.exists()
    folder_to_build(out, {**job, "sources": ["third"]}, 100, overwrite=True)
    assert not block.exists()


@pytest.mark.parametrize("moved", range(6))
def test_a_replacement_that_was_put_in_place_in_part_is_put_there_in_whole(tmp_path, monkeypatch, moved):
    """The parts that are moved before the process ends; the manifest comes last, so that nothing opens until then."""
    out, new = build(tmp_path / "out", RECORDS).path, build(tmp_path / "new", mixed_records(5)).path
    expected = contents(new)
    shutil.copytree(new, out / REPLACEMENT)
    replace, done = type(out).replace, []

    def ended(path, target):
        if len(done) == moved:
            raise InterruptedError
        done.append(path.name)
        return replace(path, target)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(type(out), "replace", ended)
        put_in_place(out)
    assert MANIFEST not in done and not (out / MANIFEST).exists()
    assert folder_to_build(out, json.loads((new / JOB).read_text()), 2**26, overwrite=False) is None
    clear(out)
    assert contents(out) == expected
