"""The embedded corpus: bilingual stories, English to retain and Spanish to forget.

Stories are told by the grammar in `sgtm/data/stories` from (language, split, number) alone, so the corpus is the same
on every machine and nothing is downloaded. They go through `prepare` like any other source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sgtm.data.prepare import open_prepared, prepare
from sgtm.data.readers import Record, Source, SourceBlock
from sgtm.data.rules import Rules
from sgtm.data.store import Corpus
from sgtm.data.stories.grammar import Dice, Teller
from sgtm.data.stories.languages import language

EDITION = 1
"""Counts changes of the grammar: a corpus of another edition is written again."""
Code = Literal["en", "es"]
LANGUAGES: tuple[Code, ...] = ("en", "es")
RULES = Rules.model_validate({"split": {"field": "split"}, "labels": {"en": "retain", "es": "forget:es"}})
STORIES = 6000, 300
"""Of each language, in train and test: about 6 MB of text in each."""
STORIES_PER_BLOCK = 500
STORY_BYTES = 1000
_SPLITS = {"train": 0, "test": 1}


@dataclass
class StorySource(Source):
    """`count` stories of one language and split. Train and test are told from different dice."""

    code: Code
    split: str
    count: int

    @property
    def size(self) -> int:
        return self.count * STORY_BYTES

    def fingerprint(self) -> Any:
        return ["stories", EDITION, self.code, self.split, self.count]

    def blocks(self, columns: Sequence[str]) -> Iterator[SourceBlock]:
        for first in range(0, self.count, STORIES_PER_BLOCK):
            yield StoryBlock(self.code, self.split, first, min(first + STORIES_PER_BLOCK, self.count))


@dataclass(frozen=True)
class StoryBlock:
    code: Code
    split: str
    first: int
    last: int

    @property
    def progress(self) -> int:
        return (self.last - self.first) * STORY_BYTES

    def records(self) -> Iterator[Record]:
        path = f"stories/{self.code}/{self.split}"
        for number, text in enumerate(tell_stories(self.code, self.split, self.first, self.last), self.first):
            yield Record(path, f"{path} {number}", {"text": text, "category": self.code, "split": self.split})


def tell_stories(code: Code, split: str, first: int, last: int) -> list[str]:
    """Stories number `first:last` of a language, about 1,000 characters each."""
    seed = LANGUAGES.index(code), _SPLITS[split]
    return [Teller(language(code), Dice(*seed, number)).tell() for number in range(first, last)]


def write_synthetic_corpus(
    out: str | Path, vocab_size: int, stories: int = STORIES[0], test_stories: int = STORIES[1]
) -> Corpus:
    """Writes the corpus, or opens it where it is there already.

    vocab_size            of the byte-level BPE trained on both languages
    stories, test_stories of each language in splits `train` and `test`

    Raises ValueError where `vocab_size` is more than the stories can fill.
    """
    sources = _sources(stories, test_stories)
    return prepare(sources, RULES, "train", out, vocab_size=vocab_size, workers=1, overwrite=True)


def open_synthetic(
    runs: str | Path, vocab_size: int, verify: Literal["hashes", "sizes"] = "hashes", *, write: bool = True
) -> Corpus:
    """The corpus at `<runs>/synthetic-<vocab_size>`, of `STORIES`.

    write  whether it is written where it is missing, damaged or of another edition

    Raises ValueError where it is and `write` is False.
    """
    out = Path(runs) / f"synthetic-{vocab_size}"
    try:
        corpus = open_prepared(_sources(*STORIES), RULES, "train", out, vocab_size=vocab_size, verify=verify)
    except ValueError:
        if not write:
            raise
        corpus = None
    if corpus is not None:
        return corpus
    if not write:
        relative = f"; runs: {runs} is relative to the directory it ran in, and this is {Path.cwd()}"
        raise ValueError(
            f"no synthetic corpus of this version at {out}, where `sgtm train` writes it"
            f"{'' if out.is_absolute() else relative}; give the folder of the run's corpus with --data.path DIR"
        )
    return write_synthetic_corpus(out, vocab_size, *STORIES)


def _sources(stories: int, test_stories: int) -> list[StorySource]:
    counts = {"train": stories, "test": test_stories}
    return [StorySource(code, split, count) for split, count in counts.items() for code in LANGUAGES]
