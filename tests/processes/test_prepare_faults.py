"""`sgtm prepare` on a full disk, killed, and twice at once: a message or the same corpus, never another one that opens.

`test_prepare_resume.py` interrupts it between any two writes; here processes really die, and files do not fit.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml
from bare import python_path
from corpora import BYTES, contents, mixed_records, write_jsonl
from waiting import PATIENCE, wait_until

from sgtm.data import readers
from sgtm.data.discover import open_sources
from sgtm.data.prepare import prepare
from sgtm.data.rules import Rules
from sgtm.data.store import DOCUMENTS, LOCK, Corpus

RULES = {"split": {"field": "split"}, "labels": {"en": "retain", "es": "forget:es", "web": "unlabeled"}}


def run(source: Path, out: Path, workers: int = 1, shard_tokens: int = 1000) -> Corpus:
    rules = Rules.model_validate(RULES)
    options = {"vocab_size": BYTES, "workers": workers, "shard_tokens": shard_tokens}
    return prepare(open_sources([source]), rules, "train", out, **options)


@pytest.fixture
def long_source(tmp_path: Path) -> Path:
    """Some hundred blocks for the processes of `start`."""
    return write_jsonl(tmp_path / "b.jsonl", mixed_records(600))


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes, in this process and those it starts."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("records", "block_bytes", "shard_tokens", "workers", "largest"),
    [
        (60, 1000, 1000, 1, DOCUMENTS),
        (600, 5000, 10**6, 1, "00000.bin"),
        (60, 10**6, 1000, 1, "00000000.npz"),
        (60, 10**6, 1000, 2, "00000000.npz"),
    ],
)
def test_a_full_disk(tmp_path: Path, monkeypatch, records, block_bytes, shard_tokens, workers, largest):
    """Files of every size, the largest of which is another one each time, just do not fit."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", block_bytes)
    source = write_jsonl(tmp_path / "a.jsonl", mixed_records(records))
    whole = run(source, tmp_path / "whole", shard_tokens=shard_tokens).path
    expected, named = contents(whole), set()
    sizes = {path.stat().st_size for path in whole.rglob("*") if path.is_file()}
    for size in (0, max(sizes) // 2, *sorted(size - 1 for size in sizes if size)):
        out = tmp_path / f"room-{size}"
        with room(size), pytest.raises(OSError) as raised:
            run(source, out, workers, shard_tokens)
        assert raised.value.strerror == "File too large"
        named.add(Path(raised.value.filename).name)
        with pytest.raises(ValueError, match="interrupted"):
            Corpus.open(out)
        assert contents(run(source, out, workers, shard_tokens).path) == expected
    assert named >= {"job.json", "tokenizer.json", largest}


def start(source: Path, out: Path, block_bytes: int = 500) -> subprocess.Popen:
    """The command line with two workers, in small blocks."""
    (rules := out.with_name("rules.yaml")).write_text(yaml.safe_dump(RULES))
    set_blocks = f"from sgtm.data import readers; readers.BLOCK_BYTES = {block_bytes}"
    code = (
        f"{set_blocks}\nif __name__ == '__main__':\n    from sgtm.commands.main import run; raise SystemExit(run())\n"
    )
    (job := out.with_name("job.py")).write_text(code)
    options = ["--rules", rules, "--out", out, "--vocab-size", BYTES, "--workers", 2, "--shard-tokens", 1000]
    command = [sys.executable, job, "prepare", source, *options]
    root = Path(readers.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": python_path(root, root / "kernels")}
    return subprocess.Popen(
        [str(word) for word in command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_blocks(out: Path, count: int, *processes: subprocess.Popen) -> None:
    """Until so many blocks are encoded."""
    wait_until(lambda: len(list(out.glob("blocks/*/*.npz"))) >= count, *processes, every=0.001)


def finish(process: subprocess.Popen) -> None:
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, printed


@pytest.mark.parametrize("victim", ["main process", "worker"])
def test_killed_again_and_again(long_source: Path, tmp_path: Path, victim: str):
    """What a worker or the main process had done when it was killed is kept, and the rest is done once."""
    expected, out, chance = contents(run(long_source, tmp_path / "alone").path), tmp_path / "out", random.Random(victim)
    for count in sorted(chance.sample(range(1, 40), 2)):
        process = start(long_source, out)
        wait_for_blocks(out, count, process)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        workers = [one for one in family[1:] if "spawn_main" in " ".join(one.cmdline())]
        (family[0] if victim == "main process" else chance.choice(workers)).kill()
        printed, _ = process.communicate(timeout=PATIENCE)
        if victim == "worker":
            assert process.returncode == 2 and "a worker process died" in printed, printed
        with pytest.raises(ValueError, match="interrupted"):
            Corpus.open(out)
    finish(start(long_source, out))
    assert contents(out) == expected


def test_twice_at_once_and_one_of_them_killed(long_source: Path, tmp_path: Path):
    """The second waits for the first, and takes over what that one has done."""
    out = tmp_path / "out"
    first = start(long_source, out)
    wait_for_blocks(out, 5, first)
    psutil.Process(first.pid).suspend()
    second = start(long_source, out)
    wait_until(lambda: (out / LOCK) in [Path(file.path) for file in psutil.Process(second.pid).open_files()], second)
    time.sleep(1)
    assert second.poll() is None and not psutil.Process(second.pid).children()
    first.kill()
    first.communicate()
    finish(second)
    assert contents(out) == contents(run(long_source, tmp_path / "alone").path)
