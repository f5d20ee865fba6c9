"""Tokenizers as people have them: control tokens declared or not, as pieces of the model, with templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from sgtm.data.synthetic import tell_stories
from sgtm.data.tokenizer import EOS, train_bpe

BOS, PAD, UNK = "<s>", "<pad>", "<unk>"
CONTROLS = st.sampled_from([EOS, BOS, "</s>", UNK, PAD, "<|endof", "text|>", " ", "\n"])
ANY_TEXT = st.lists(st.one_of(st.text(), CONTROLS), max_size=9).map("".join)
"""Texts with strings of control tokens, whole and in parts."""
STORIES = tell_stories("en", "train", 0, 8) + tell_stories("es", "train", 0, 8)


def byte_level(**changes) -> Tokenizer:
    """A byte-level BPE of 400 entries; `changes` replace parts of its tokenizer.json."""
    return Tokenizer.from_str(json.dumps(json.loads(train_bpe(STORIES, 400).to_str()) | changes))


def with_template(template: str) -> Tokenizer:
    """A byte-level BPE that puts tokens around a text: `$A` is the text."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens([BOS, PAD])
    names = [(name, tokenizer.token_to_id(name)) for name in (EOS, BOS) if name in template]
    if names:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=names)
    return tokenizer


def not_declared() -> Tokenizer:
    """Its end-of-text and padding are added tokens like others, so a text that holds their strings has their ids."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(PAD, special=False)])
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = False
    return Tokenizer.from_str(json.dumps(state))


def piece(ignore_merges: bool) -> Tokenizer:
    """Its end-of-text is a piece of the model: looked up as a whole, or merged."""
    state = json.loads(byte_level().to_str())
    state["added_tokens"] = []
    state["pre_tokenizer"]["use_regex"] = False
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    for length in range(2, len(EOS)):
        vocab.setdefault(EOS[:length], len(vocab))
    if ignore_merges:
        state["model"]["ignore_merges"] = True
    else:
        merges[:0] = [[EOS[:length], EOS[length]] for length in range(1, len(EOS))]
    return Tokenizer.from_str(json.dumps(state))


def unigram() -> Tokenizer:
    """As sentencepiece has it: control tokens are pieces with score 0, characters that it lacks become `<unk>`."""
    letters = sorted({letter for story in STORIES for letter in story} - {" "} | set(EOS + UNK + "▁/"))
    pieces = [(UNK, 0.0), (EOS, 0.0), (BOS, 0.0), ("</s>", 0.0), *((letter, -5.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("▁the", -3.0), ("en", -4.0)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens([BOS, "</s>"])
    return tokenizer


KINDS: dict[str, tuple[Callable[[], Tokenizer], bool]] = {
    "ours": (byte_level, True),
    "bos": (lambda: with_template(f"{BOS} $A"), True),
    "eos": (lambda: with_template(f"$A {EOS}"), True),
    "bos-and-eos": (lambda: with_template(f"{BOS} $A {EOS}"), True),
    "not-declared": (not_declared, True),
    "merged-piece": (lambda: piece(ignore_merges=False), True),
    "whole-piece": (lambda: piece(ignore_merges=True), True),
    "unigram": (unigram, False),
}
"""By name: what makes it, and whether every text comes back."""


def write_folder(folder: Path, tokenizer: Tokenizer, **names: str) -> Path:
    """A tokenizer's folder; `names` go into its tokenizer_config.json."""
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder
