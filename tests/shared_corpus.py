"""The synthetic corpus, written once by every process that runs tests, and copied where a run would write it again.

Writing it takes six seconds, and every run with `--runs` of its own begins so.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sgtm.data import synthetic
from sgtm.data.store import Corpus

write = synthetic.write_synthetic_corpus


def install() -> None:
    """From now on `open_synthetic` copies, in this process and in those that are forked from it."""
    synthetic.write_synthetic_corpus = _copy


def _copy(out: str | Path, vocab_size: int, *stories: int, **named: int) -> Corpus:
    if stories != synthetic.STORIES or named:
        return write(out, vocab_size, *stories, **named)
    shared = Path(os.environ["SGTM_CACHE"]) / f"synthetic-{vocab_size}-{synthetic.EDITION}"
    if not shared.exists():
        new = shared.with_name(f"{shared.name}-{os.getpid()}")
        write(new, vocab_size, *stories)
        new.rename(shared)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(shared, out)
    return Corpus.open(Path(out))
