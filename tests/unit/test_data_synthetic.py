"""The embedded corpus: the same everywhere, two languages that share no words to speak of, no story twice."""

import re
from collections import Counter

import pytest
from corpora import contents, texts

from sgtm.config.schema import Config
from sgtm.data.loader import Loader
from sgtm.data.stories.grammar import Dice, Teller
from sgtm.data.stories.languages import SpanishNoun, language
from sgtm.data.synthetic import open_corpus, tell_stories, write_synthetic_corpus


def words(code: str) -> Counter:
    return Counter(re.findall(r"\w+", " ".join(tell_stories(code, "train", 0, 400)).lower()))


def test_stories_are_fixed_and_never_repeat():
    assert tell_stories("es", "train", 5, 7) == tell_stories("es", "train", 0, 10)[5:7]
    told = [
        story for code in ("en", "es") for split in ("train", "test") for story in tell_stories(code, split, 0, 400)
    ]
    assert len(set(told)) == len(told)
    assert all(400 < len(story) < 4000 for story in told)


def test_the_languages_share_hardly_a_word():
    english, spanish = words("en"), words("es")
    both = english.keys() & spanish.keys()
    assert len(both) <= 8, sorted(both)
    assert sum(spanish[word] for word in both) < 0.04 * spanish.total()
    assert min(len(english), len(spanish)) > 700


@pytest.mark.parametrize("code", ["en", "es"])
def test_every_template_can_be_told(code):
    told = language(code)
    teller = Teller(told, Dice(0))
    assert {scene for plot in told.plots for scene in plot} == set(told.scenes)
    for template in [wording for wordings in told.scenes.values() for wording in wordings]:
        for _ in range(5):
            assert not set("{}|") & set(template.format_map(teller)), template


@pytest.mark.parametrize("code", ["en", "es"])
def test_stories_are_well_formed(code):
    for story in tell_stories(code, "train", 0, 300):
        assert story[0].isupper() or story[0] in '—¿¡"'
        assert story.rstrip('"»')[-1] in ".!?", story
        assert "  " not in story and " ." not in story and " ," not in story
        assert not re.search(r"\b(a el|de el|y [iI]\w+|un una|el la)\b" if code == "es" else r"\ba [aeiou]\w+\b", story)
        assert not re.search(r"[?!] —[A-ZÁÉÍÓÚ]", story)  # "—¿Dónde? —preguntó", not "—Preguntó"
        assert story.count("«") == story.count("»") and story.count('"') % 2 == 0


def test_spanish_nouns():
    forms = [f"{SpanishNoun(*noun):{form}}" for noun, form in
             [(("llave", "f"), "el"), (("molino", "m"), "al"), (("torre", "f"), "del"), (("bastón", "m"), "s"),
              (("lápiz", "m"), "los"), (("canal", "m"), "un"), (("paraguas", "m", "paraguas"), "los")]]  # fmt: skip
    assert forms == ["la llave", "al molino", "de la torre", "bastones", "los lápices", "un canal", "los paraguas"]
    with pytest.raises(ValueError, match="'torre' has no form 'x'"):
        format(SpanishNoun("torre", "f"), "x")


def test_the_corpus_is_the_same_wherever_it_is_written(tmp_path):
    corpus = write_synthetic_corpus(tmp_path / "a", 600, stories=40, test_stories=5)
    other = write_synthetic_corpus(tmp_path / "b", 600, stories=40, test_stories=5)
    assert contents(corpus.path) == contents(other.path)
    assert corpus.categories == {"en": "retain", "es": "forget:es"} and corpus.vocab_size == 600
    told = texts(corpus)
    assert [told[i] for i in corpus.select("test", "es")] == tell_stories("es", "test", 0, 5)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.bin")}
    write_synthetic_corpus(tmp_path / "a", 600, stories=40, test_stories=5)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.bin")} == before


def test_a_config_opens_it_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("sgtm.data.synthetic.STORIES", (60, 5))
    model = {"layers": 1, "hidden_size": 16, "heads": 4, "intermediate_size": 16, "vocab_size": 600, "context": 32}
    config = Config.model_validate(
        {
            "runs": str(tmp_path),
            "model": model,
            "masking": {"domains": ["es"], "forget_neurons": 2},
            "data": {"path": "synthetic"},
            "train": {"tokens_per_step": 256, "micro_batch": 2},
        }
    )
    corpus = open_corpus(config)
    assert corpus.path == tmp_path / "synthetic-600"
    assert Loader(corpus, config).step(0)[0].step_targets == 256
    missing = config.model_copy(update={"data": config.data.model_copy(update={"path": str(tmp_path / "no")})})
    with pytest.raises(ValueError, match="no corpus at"):
        open_corpus(missing)
