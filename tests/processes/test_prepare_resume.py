"""A corpus depends on its input alone: not on the number of workers, and not on where `prepare` was killed, nor on
what another job has left in the folder.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from bare import python_path
from corpora import BYTES, contents, mixed_records, texts, write_jsonl
from waiting import PATIENCE, wait_until

from sgtm.data import prepare as prepare_module
from sgtm.data import readers
from sgtm.data.discover import open_sources
from sgtm.data.prepare import prepare
from sgtm.data.rules import Rules
from sgtm.data.store import MANIFEST, Corpus

RULES = Rules.model_validate(
    {"split": {"field": "split"}, "labels": {"en": "retain", "es": "forget:es", "web": "unlabeled"}}
)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the project catches it."""


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 5000)
    return write_jsonl(tmp_path / "a.jsonl", mixed_records())


def run(source: Path, out: Path, **options) -> Corpus:
    options = {"vocab_size": BYTES, "workers": 1, "shard_tokens": 1000, **options}
    return prepare(open_sources([source]), RULES, "train", out, **options)


def kill_at(monkeypatch, moment: int) -> None:
    """Dies at the `moment`-th time a file is flushed, before or after, or is about to get or has got its name.

    As another process than the one that resumes, whose unfinished files have other names.
    """
    monkeypatch.setattr(os, "getpid", lambda: 1)
    clock = [0]

    def counted(original):
        def call(*args):
            for act in (lambda: None, lambda: original(*args)):
                result = act()
                if clock[0] == moment:
                    raise Killed
                clock[0] += 1
            return result

        return call

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))


def test_killed_at_any_moment_it_does_not_open_and_resumes_to_the_same_bytes(source, tmp_path):
    expected = contents(run(source, tmp_path / "whole").path)
    assert sum(name.startswith("shards/") for name in expected) > 3
    opened = 0
    for moment in range(1000):
        out = tmp_path / f"killed-{moment}"
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, moment)
            try:
                run(source, out)
                break
            except Killed:
                pass
        if (out / MANIFEST).exists():
            assert texts(Corpus.open(out)) == texts(Corpus.open(tmp_path / "whole"))
            opened += 1
        else:
            with pytest.raises(ValueError, match="interrupted"):
                Corpus.open(out)
        assert contents(run(source, out).path) == expected
    assert moment > 20 and opened == 1


def interrupt(source: Path, out: Path, **options) -> dict[Path, int]:
    """Killed when all blocks are encoded; returns their files and when each was written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "_merge", lambda *args: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(source, out, **options)
    return written(out)


def written(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.glob("blocks/*/*")}


def test_finished_blocks_are_reused(source, tmp_path, monkeypatch):
    blocks = interrupt(source, tmp_path / "out")
    assert len(blocks) == 3
    snapshots = []
    original = prepare_module._merge

    def merge(out, *rest):
        snapshots.append(written(out))
        original(out, *rest)

    monkeypatch.setattr(prepare_module, "_merge", merge)
    run(source, tmp_path / "out")
    assert snapshots == [blocks]
    assert not (tmp_path / "out/blocks").exists()


@pytest.fixture
def other(source, tmp_path) -> Path:
    """As many blocks as `source`, of other texts, which give another tokenizer."""
    return write_jsonl(tmp_path / "b.jsonl", [{**r, "text": "xy" + r["text"][2:]} for r in mixed_records()])


def test_nothing_of_another_job_is_taken(source, other, tmp_path):
    options = {"vocab_size": BYTES + 12}
    interrupt(other, tmp_path / "out", **options)
    files = contents(run(source, tmp_path / "out", **options).path)
    assert files == contents(run(source, tmp_path / "alone", **options).path)
    foreign = contents(run(other, tmp_path / "other", **options).path)
    assert files["tokenizer/tokenizer.json"] != foreign["tokenizer/tokenizer.json"]


@pytest.mark.parametrize("late", [False, True], ids=["cannot be deleted", "put in place late"])
def test_a_block_of_another_job_never_counts(source, other, tmp_path, monkeypatch, late):
    blocks = {path: path.read_bytes() for path in interrupt(other, tmp_path / "out")}
    clear, encode = shutil.rmtree, prepare_module.encode_blocks

    def all_but_blocks(path, *rest, **options):
        if path != tmp_path / "out/blocks":
            clear(path, *rest, **options)

    def after_a_late_worker(*args):
        for path, data in blocks.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        return encode(*args)

    if late:
        monkeypatch.setattr(prepare_module, "encode_blocks", after_a_late_worker)
    else:
        monkeypatch.setattr(shutil, "rmtree", all_but_blocks)
    documents = texts(run(source, tmp_path / "out"))
    assert all(path.exists() for path in blocks) != late
    assert sorted(documents) == sorted(r["text"] for r in mixed_records())


def test_a_tokenizer_of_another_job_that_cannot_be_deleted_is_refused(source, other, tmp_path, monkeypatch):
    interrupt(other, tmp_path / "out")
    unlink = os.unlink

    def refused(path, **options):
        if Path(os.fsdecode(path)).name == "tokenizer.json":
            raise PermissionError(1, "Operation not permitted", path)
        unlink(path, **options)

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(PermissionError) as raised:
            patch.setattr(os, "unlink", refused)
            run(source, tmp_path / "out")
        assert str(raised.value.filename) == str(tmp_path / "out/tokenizer/tokenizer.json")
    assert contents(run(source, tmp_path / "out").path) == contents(run(source, tmp_path / "alone").path)


def test_blocks_of_another_order_of_labels_are_not_taken(source, tmp_path):
    """They hold positions in the list of labels."""
    interrupt(source, tmp_path / "out")
    rules = Rules(split=RULES.split, labels=dict(reversed(RULES.labels.items())))
    options = {"vocab_size": BYTES, "workers": 1, "shard_tokens": 1000}
    corpus = prepare(open_sources([source]), rules, "train", tmp_path / "out", **options)
    assert list(corpus.categories) == list(rules.labels)
    names = [list(corpus.categories)[number] for number in corpus.documents["category"]]
    assert all(text.startswith(name) for text, name in zip(texts(corpus), names, strict=True))


def test_a_block_that_was_half_written_is_written_again(source, tmp_path, monkeypatch):
    """By a process that was killed in the middle, so that nothing cleaned up after it."""

    def half(file, **arrays):
        file.write(b"PK")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "getpid", lambda: 1)
        patch.setattr(np, "savez", half)
        run(source, tmp_path / "out")
    assert len(written(tmp_path / "out")) == 1
    assert len(interrupt(source, tmp_path / "out")) == 3, "what was half written has gone"
    assert contents(run(source, tmp_path / "out").path) == contents(run(source, tmp_path / "alone").path)


def test_shards_of_an_interrupted_merge_do_not_stay(source, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sgtm.data.writer.CorpusWriter.finish", lambda *args: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(source, tmp_path / "out", shard_tokens=100)
    assert contents(run(source, tmp_path / "out").path) == contents(run(source, tmp_path / "fresh").path)


def test_one_worker_or_two(source, tmp_path):
    assert contents(run(source, tmp_path / "one").path) == contents(run(source, tmp_path / "two", workers=2).path)


def test_a_worker_names_the_bad_line_too(source, tmp_path):
    with source.open("a") as handle:
        handle.write('{"text": "x", "category": "it", "split": "test"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:181: unknown category 'it'"):
        prepare(open_sources([source]), RULES, tokenizer_folder(tmp_path), tmp_path / "out", workers=2)


def tokenizer_folder(tmp_path) -> Path:
    run(write_jsonl(tmp_path / "b.jsonl", mixed_records(5)), tmp_path / "other")
    return tmp_path / "other/tokenizer"


def test_sigkill_leaves_no_workers_and_no_corpus(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", mixed_records(150))
    script = (
        "import sys; from sgtm.data import readers; from sgtm.data.prepare import *\n"
        "from sgtm.data.discover import open_sources\n"
        "if __name__ == '__main__':\n"
        "    readers.BLOCK_BYTES = 500\n"
        "    rules = Rules.model_validate_json(sys.argv[3])\n"
        "    prepare(open_sources([sys.argv[1]]), rules, 'train', sys.argv[2], vocab_size=257, workers=2)\n"
    )
    (tmp_path / "job.py").write_text(script)
    root = Path(prepare_module.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": python_path(root, root / "kernels")}
    command = [sys.executable, str(tmp_path / "job.py"), str(source), str(tmp_path / "out"), RULES.model_dump_json()]
    process = subprocess.Popen(command, env=environment)
    try:
        wait_until(lambda: len(list((tmp_path / "out").glob("blocks/*/*.npz"))) >= 5, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not psutil.wait_procs(workers, timeout=PATIENCE)[1]
    with pytest.raises(ValueError, match="interrupted"):
        Corpus.open(tmp_path / "out")
    subprocess.run(command, env=environment, check=True)
    assert sorted(texts(Corpus.open(tmp_path / "out"))) == sorted(r["text"] for r in mixed_records(150))


def test_overwriting_killed_at_any_moment_leaves_the_old_corpus_or_resumes_to_the_new(source, tmp_path):
    """There is a moment in between, while the files are moved, in which neither opens."""
    other = write_jsonl(tmp_path / "b.jsonl", mixed_records(10))
    expected, opened = contents(run(source, tmp_path / "whole").path), {"old": 0, "new": 0, "none": 0}
    for moment in range(1000):
        out = tmp_path / f"killed-{moment}"
        before = contents(run(other, out).path)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, moment)
            try:
                run(source, out, overwrite=True)
                break
            except Killed:
                pass
        if not (out / MANIFEST).exists():
            opened["none"] += 1
        elif texts(Corpus.open(out)) == texts(Corpus.open(tmp_path / "whole")):
            opened["new"] += 1
        else:
            assert contents(out).items() >= before.items()
            opened["old"] += 1
        assert contents(run(source, out, overwrite=True).path) == expected
    assert opened["old"] > 20 and opened["none"] == 11 and opened["new"] == 1


@pytest.mark.parametrize("refused", ["vocabulary", "category"])
def test_overwriting_with_what_is_refused_leaves_the_old_corpus(source, tmp_path, refused):
    before = contents(run(source, tmp_path / "out").path)
    if refused == "category":
        write_jsonl(source, [*mixed_records(), {"text": "x", "category": "it", "split": "test"}])
    with pytest.raises(ValueError, match=r"vocabulary of only|unknown category 'it'"):
        run(source, tmp_path / "out", overwrite=True, vocab_size=4096 if refused == "vocabulary" else BYTES)
    Corpus.open(tmp_path / "out")
    assert contents(tmp_path / "out").items() >= before.items()
    if refused == "vocabulary":
        assert contents(run(source, tmp_path / "out").path) == before
