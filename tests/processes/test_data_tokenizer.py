"""Tokenizers are trained alike from the same documents, and text comes back as it went in."""

import json
import time

import pytest
from corpora import mixed_records, write_jsonl
from tokenizers import Tokenizer

from sgtm.data import prepare as prepare_module
from sgtm.data.discover import open_sources
from sgtm.data.encode import token_spans
from sgtm.data.prepare import open_prepared, prepare
from sgtm.data.rules import Rules
from sgtm.data.store import Corpus
from sgtm.data.synthetic import tell_stories
from sgtm.data.tokenizer import (
    EOS,
    eos_token,
    load_tokenizer,
    named_tokens,
    sample_texts,
    train_bpe,
    vocabulary_size,
)
from sgtm.files import sha256_of

STORIES = tell_stories("en", "train", 0, 20) + tell_stories("es", "train", 0, 20)


def test_training_depends_on_the_set_of_documents_alone():
    samples = [sample_texts(order, 20_000) for order in (STORIES, STORIES[::-1])]
    assert samples[0] == samples[1]
    assert 15_000 < sum(len(text.encode()) for text in samples[0]) <= 20_000
    assert train_bpe(samples[0], 400).to_str() == train_bpe(samples[1], 400).to_str()


def test_the_vocabulary_has_exactly_the_size_asked_for():
    tokenizer = train_bpe(STORIES, 700)
    assert tokenizer.get_vocab_size() == vocabulary_size(tokenizer) == 700
    assert eos_token(tokenizer) == EOS
    with pytest.raises(ValueError, match="256 bytes and the end-of-text token need 257"):
        train_bpe(STORIES, 256)
    with pytest.raises(ValueError, match=r"only 2\d\d entries, not vocab_size 5000;.*--vocab-size 2\d\d ") as error:
        train_bpe(["too little"], 5000)
    assert train_bpe(["too little"], int(str(error.value).split()[-1].rstrip(")")))


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_gpt2_folders(tmp_path, names):
    trained = train_bpe(STORIES, 400)
    model = json.loads(trained.to_str())["model"]
    (tmp_path / names[0]).write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (tmp_path / names[1]).write_text(f"#version: 0.2\n{merges}\n")
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(STORIES[3]).ids == trained.encode(STORIES[3]).ids
    assert loaded.get_vocab_size() == 400 and eos_token(loaded, tmp_path) == EOS


def test_bad_tokenizer_folders(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer in .*: expected tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer at gpt2: no such folder; names of the Hugging Face hub"):
        load_tokenizer("gpt2")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="is damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", '{"eos_token": 5}', '{"eos_token": {"content": 5}}'])
def test_a_damaged_tokenizer_config_is_named(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is damaged \(.+\); expected"):
        eos_token(train_bpe([], 257), tmp_path)


def test_the_end_of_text_token_is_the_one_the_folder_names(tmp_path):
    tokenizer = train_bpe(STORIES, 400)
    tokenizer.add_special_tokens(["<stop>"])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    assert eos_token(tokenizer, tmp_path) == "<stop>"
    bare = Tokenizer.from_str(tokenizer.to_str().replace(EOS, "<unusual>"))
    with pytest.raises(ValueError, match="no end-of-text token"):
        eos_token(bare)


def test_prepare_with_a_folder_uses_its_vocabulary(tmp_path):
    (tmp_path / "mine").mkdir()
    tokenizer = train_bpe(STORIES, 400)
    tokenizer.save(str(tmp_path / "mine/tokenizer.json"))
    rules = Rules.model_validate(
        {"split": {"field": "split"}, "labels": {"en": "retain", "es": "forget:es", "web": "unlabeled"}}
    )
    source = write_jsonl(tmp_path / "a.jsonl", mixed_records(5))
    corpus = prepare(open_sources([source]), rules, tmp_path / "mine", tmp_path / "out", workers=1)
    assert corpus.vocab_size == 400
    assert corpus.tokens(0).tolist() == [*tokenizer.encode(mixed_records(5)[0]["text"]).ids, corpus.eos_id]


def test_a_token_that_touches_a_span_is_in_it():
    offsets = [(0, 3), (3, 7), (7, 9), (9, 9), (9, 12)]
    assert token_spans(((4, 5, "b"),), offsets, ["a", "b"]) == [(1, 2, 1)]
    assert token_spans(((2, 8, "a"),), offsets, ["a"]) == [(0, 3, 0)]
    assert token_spans(((3, 7, "a"),), offsets, ["a"]) == [(1, 2, 0)]
    assert token_spans(((0, 12, "a"),), offsets, ["a"]) == [(0, 5, 0)]
    assert token_spans(((0, 4, "a"), (4, 8, "b")), offsets, ["a", "b"]) == [(0, 2, 0), (2, 3, 1)]


RULES = Rules.model_validate(
    {"split": {"field": "split"}, "labels": {"en": "retain", "es": "forget:es", "web": "unlabeled"}}
)


def tokenizer_folder(path):
    """tokenizer.json and its config, GPT-2's two files, which it comes before, and what else lies in such folders."""
    path.mkdir()
    trained = train_bpe(STORIES, 400)
    trained.save(str(path / "tokenizer.json"))
    trained.model.save(str(path))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    (path / "special_tokens_map.json").write_text("{}")
    return path


@pytest.mark.parametrize("other", ["model.safetensors", "README.md", "special_tokens_map.json", "merges.txt"])
def test_a_corpus_does_not_depend_on_what_else_lies_in_the_tokenizers_folder(tmp_path, monkeypatch, other):
    folder, source = tokenizer_folder(tmp_path / "mine"), write_jsonl(tmp_path / "a.jsonl", mixed_records(5))
    sources = open_sources([source])
    made = prepare(sources, RULES, folder, tmp_path / "out", workers=1)
    (folder / other).write_text("changed")
    hashed = []
    monkeypatch.setattr(prepare_module, "sha256_of", lambda path: hashed.append(path.name) or sha256_of(path))
    assert prepare(sources, RULES, folder, tmp_path / "out", workers=1).fingerprint == made.fingerprint
    assert open_prepared(sources, RULES, folder, tmp_path / "out").fingerprint == made.fingerprint
    assert set(hashed) == {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("part", ["tokenizer.json", "tokenizer_config.json"])
def test_a_corpus_depends_on_the_files_of_its_tokenizer(tmp_path, part):
    folder, source = tokenizer_folder(tmp_path / "mine"), write_jsonl(tmp_path / "a.jsonl", mixed_records(5))
    prepare(open_sources([source]), RULES, folder, tmp_path / "out", workers=1)
    (folder / part).unlink()
    with pytest.raises(ValueError, match=r"prepared from other options \(--tokenizer"):
        prepare(open_sources([source]), RULES, folder, tmp_path / "out", workers=1)


def test_a_corpus_of_an_earlier_version_stays_finished(tmp_path):
    """Its job lists all files of the tokenizer's folder."""
    folder, source = tokenizer_folder(tmp_path / "mine"), write_jsonl(tmp_path / "a.jsonl", mixed_records(5))
    sources = open_sources([source])
    made = prepare(sources, RULES, folder, tmp_path / "out", workers=1).fingerprint
    job = json.loads((tmp_path / "out/job.json").read_text())
    for file in folder.iterdir():
        job["tokenizer"].setdefault(file.name, "of a file that has changed since")
    for more in ({}, {"model.safetensors": "of a file that is gone"}):
        job["tokenizer"] |= more
        (tmp_path / "out/job.json").write_text(json.dumps(job))
        assert prepare(sources, RULES, folder, tmp_path / "out", workers=1).fingerprint == made
        assert open_prepared(sources, RULES, folder, tmp_path / "out") is not None
    job["tokenizer"]["tokenizer.json"] = "of another tokenizer"
    (tmp_path / "out/job.json").write_text(json.dumps(job))
    with pytest.raises(ValueError, match=r"prepared from other options \(--tokenizer"):
        prepare(sources, RULES, folder, tmp_path / "out", workers=1)


def test_names_of_control_tokens_go_with_the_corpus(tmp_path):
    folder, source = tokenizer_folder(tmp_path / "mine"), write_jsonl(tmp_path / "a.jsonl", mixed_records(5))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS, "pad_token": "!", "bos_token": "<no>"}))
    corpus = prepare(open_sources([source]), RULES, folder, tmp_path / "out", workers=1)
    assert corpus.token_names == {"eos_token": EOS, "pad_token": "!"}  # there is no <no>
    again = prepare(open_sources([source]), RULES, tmp_path / "out/tokenizer", tmp_path / "again", workers=1)
    assert again.fingerprint == corpus.fingerprint
    (tmp_path / "out/tokenizer/tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json has 2 bytes"):
        Corpus.open(tmp_path / "out")
    trained = prepare(open_sources([source]), RULES, "train", tmp_path / "out", vocab_size=280, overwrite=True)
    assert trained.token_names == {} and not (tmp_path / "out/tokenizer/tokenizer_config.json").exists()


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"])
def test_control_tokens_are_those_that_the_config_names_anywhere(tmp_path, key):
    listed = {
        "additional_special_tokens": ["<a>", {"content": "<b>"}],
        "extra_special_tokens": {"x": "<a>", "y": "<b>"},
    }
    added = {"5": {"content": "<a>", "special": True}, "6": {"content": "no"}, "7": {"content": "<b>", "special": True}}
    config = {"pad_token": {"content": "<pad>"}, "unk_token": None, key: listed.get(key, added)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    names = named_tokens(tmp_path)
    assert names.pop("pad_token") == "<pad>" and sorted(names.values()) == ["<a>", "<b>"]


@pytest.mark.parametrize("word", [" ", "x", "=-", "\u4e00"])
def test_a_run_of_one_character_trains_in_linear_time(word):
    """Sixteen times the length: 256 times the time, minutes here, where the library gets words of any length."""
    seconds = []
    for length in (100_000, 1_600_000):
        start = time.process_time()
        train_bpe([word * (length // len(word.encode()))], 260)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 48 * seconds[0] + 0.5


def test_the_cut_of_long_words_is_of_training_alone():
    tokenizer = train_bpe([*STORIES, "x" * 5000], 400)
    assert json.loads(tokenizer.to_str())["pre_tokenizer"]["type"] == "ByteLevel"
    text = "x" * 1000 + "ñ" * 1000
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_sample_is_no_larger_than_its_budget():
    for text in ("x" * 1000, "ñ" * 1000, "a🍒" * 500):
        (sample,) = sample_texts([text], 99)
        assert text.startswith(sample) and 95 < len(sample.encode()) <= 99
    assert sample_texts(["x" * 99], 99) == ["x" * 99]
