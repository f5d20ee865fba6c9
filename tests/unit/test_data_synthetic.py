"""The embedded corpus: the same everywhere, two languages that share no words to speak of, no story twice."""

import re
from collections import Counter

import pytest
from corpora import contents, texts

from sgtm.config.schema import Config
from sgtm.data.loader import Loader
from sgtm.data.open import open_corpus
from sgtm.data.synthetic import tell_stories, write_synthetic_corpus


def words(code: str) -> Counter:
    return Counter(re.findall(r"\w+", " ".join(tell_stories(code, "train", 0, 400)).lower()))


def test_stories_are_fixed_and_never_repeat():
    assert tell_stories("es", "train", 5, 7) == tell_stories("es", "train", 0, 10)[5:7]
    stories = [
        story for code in ("en", "es") for split in ("train", "test") for story in tell_stories(code, split, 0, 400)
    ]
    assert len(set(stories)) == len(stories)
    assert all(400 < len(story) < 4000 for story in stories)


def test_the_languages_share_hardly_a_word():
    english, spanish = words("en"), words("es")
    both = english.keys() & spanish.keys()
    assert len(both) <= 8, sorted(both)
    assert sum(spanish[word] for word in both) < 0.04 * spanish.total()
    assert min(len(english), len(spanish)) > 700


@pytest.mark.parametrize("code", ["en", "es"])
def test_stories_are_well_formed(code):
    for story in tell_stories(code, "train", 0, 300):
        assert story[0].isupper() or story[0] in '—¿¡"'
        assert story.rstrip('"»')[-1] in ".!?", story
        assert "  " not in story and " ." not in story and " ," not in story
        assert not re.search(r"\b(a el|de el|y [iI]\w+|un una|el la)\b" if code == "es" else r"\ba [aeiou]\w+\b", story)
        assert not re.search(r"[?!] —[A-ZÁÉÍÓÚ]", story)  # "—¿Dónde? —preguntó", not "—Preguntó"
        assert story.count("«") == story.count("»") and story.count('"') % 2 == 0


def test_the_corpus_is_the_same_wherever_it_is_written(tmp_path):
    corpus = write_synthetic_corpus(tmp_path / "a", 600, stories=40, test_stories=5)
    other = write_synthetic_corpus(tmp_path / "b", 600, stories=40, test_stories=5)
    assert contents(corpus.path) == contents(other.path)
    assert corpus.categories == {"en": "retain", "es": "forget:es"} and corpus.vocab_size == 600
    stories = texts(corpus)
    assert [stories[i] for i in corpus.select("test", "es")] == tell_stories("es", "test", 0, 5)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.bin")}
    write_synthetic_corpus(tmp_path / "a", 600, stories=40, test_stories=5)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.bin")} == before


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    """A small model on a small synthetic corpus."""
    monkeypatch.setattr("sgtm.data.synthetic.STORIES", (60, 5))
    model = {"layers": 1, "hidden_size": 16, "heads": 4, "intermediate_size": 16, "vocab_size": 600, "context": 32}
    return Config.model_validate(
        {
            "runs": str(tmp_path / "runs"),
            "model": model,
            "masking": {"domains": ["es"], "forget_neurons": 2},
            "data": {"path": "synthetic"},
            "train": {"tokens_per_step": 256, "micro_batch": 2},
        }
    )


def test_a_config_opens_it_by_name(config, tmp_path):
    corpus = open_corpus(config)
    assert corpus.path == tmp_path / "runs" / "synthetic-600"
    assert Loader(corpus, config).step(0)[0].step_targets == 256


def test_a_finished_corpus_is_opened_as_asked_and_without_the_lock(config, monkeypatch):
    shard = open_corpus(config).path / "shards/00000.bin"
    with monkeypatch.context() as patch:
        patch.setattr("sgtm.data.synthetic.prepare", lambda *a, **k: pytest.fail("prepared again, under its lock"))
        assert open_corpus(config).vocab_size == 600
        content = bytearray(shard.read_bytes())
        content[0] ^= 1
        shard.write_bytes(content)
        open_corpus(config, "sizes")
        with pytest.raises(ValueError, match=r"00000\.bin was changed"):
            open_corpus(config, write=False)
    open_corpus(config)  # damaged, so written again
    content[0] ^= 1
    assert shard.read_bytes() == content


def test_a_corpus_of_another_edition_is_written_anew(config, monkeypatch):
    path = open_corpus(config).path
    before = (path / "job.json").read_text()
    monkeypatch.setattr("sgtm.data.synthetic.EDITION", 99)
    with pytest.raises(ValueError, match="no synthetic corpus of this version"):
        open_corpus(config, write=False)
    assert (path / "job.json").read_text() == before
    open_corpus(config)
    assert (path / "job.json").read_text() == before.replace('"stories", 1', '"stories", 99')


def test_what_only_reads_writes_no_corpus(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=rf"at {tmp_path}/runs/synthetic-600, where `sgtm train` writes it; give the folder"
    ):
        open_corpus(config, write=False)
    relative = config.model_copy(update={"runs": "runs"})
    with pytest.raises(
        ValueError, match=rf"at runs/synthetic-600, .* runs: runs is relative .* this is {tmp_path}; give"
    ):
        open_corpus(relative, write=False)
    assert not list(tmp_path.iterdir())
