"""Tokenizers: training a byte-level BPE, or loading one.

The promise: the same documents give the same tokenizer, in whatever order and by however many processes they are read.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sgtm.data.rules import stable_id

EOS = "<|endoftext|>"
CONFIG = "tokenizer_config.json"
_FORMS = (("tokenizer.json",), ("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
_LONGEST_WORD = 256
"""Bytes of a word in training, longer ones are cut: the time that the library takes grows with a word's square."""
PIECE_CHARACTERS = 2**18
"""Of a text that is trained on or encoded at a time: what the library makes of it takes some 400 bytes a token."""
_BETWEEN_WORDS = re.compile(r"(?<=\w) (?=\w)")
_EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<eos>", "<|eot|>")
_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (Radford et al., 2019) with exactly `vocab_size` entries, the EOS among them.

    Raises ValueError where `vocab_size` cannot hold the 256 bytes and the EOS, or the text is too poor to fill it.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes and the end-of-text token need 257")
    tokenizer = _byte_level(models.BPE())
    in_use = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([in_use, pre_tokenizers.FixedLength(length=_LONGEST_WORD)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in cut(text, PIECE_CHARACTERS)), trainer)
    tokenizer.pre_tokenizer = in_use
    entries = tokenizer.get_vocab_size()
    if entries != vocab_size:
        raise ValueError(
            f"the text yields a vocabulary of only {entries} entries, not vocab_size {vocab_size}; "
            f"give more text, or lower it: --vocab-size {entries} (of the synthetic data: --model.vocab_size {entries})"
        )
    return tokenizer


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The files that decide what a folder's tokenizer does; whatever else lies there has no part in it.

    Raises ValueError where there is no tokenizer.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ValueError(f"no tokenizer at {folder}: no such folder; names of the Hugging Face hub are not looked up")
    files = read_from({file.name for file in folder.iterdir() if file.is_file()} if folder.is_dir() else ())
    if not files:
        raise ValueError(
            f"no tokenizer in {folder}: expected tokenizer.json, encoder.json and vocab.bpe, or vocab.json and "
            f"merges.txt"
        )
    return [folder / name for name in files]


def read_from(names: Collection[str]) -> list[str]:
    """Those of a folder's files that its tokenizer is read from; none where there is no tokenizer."""
    for form in _FORMS:
        if all(name in names for name in form):
            return [*form, CONFIG] if CONFIG in names else [*form]
    return []


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Loads a folder with `tokenizer.json`, or GPT-2's `encoder.json` and `vocab.bpe` (or `vocab.json`, `merges.txt`).

    Raises ValueError where there is neither, or the file is damaged.
    """
    files = [str(file) for file in tokenizer_files(folder) if file.name != CONFIG]
    try:
        if len(files) == 1:
            return Tokenizer.from_file(files[0])
        tokenizer = _byte_level(models.BPE.from_file(*files))
        tokenizer.add_special_tokens([EOS])
        return tokenizer
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"the tokenizer in {folder} is damaged: {error}") from None


def eos_token(tokenizer: Tokenizer, folder: str | Path | None = None) -> str:
    """The token that ends a document: that of `tokenizer_config.json`, else the first usual name in the vocabulary.

    Raises ValueError where there is none, or that file is damaged.
    """
    name = named_tokens(folder).get("eos_token") if folder else None
    if name and tokenizer.token_to_id(name) is not None:
        return name
    for name in _EOS_NAMES:
        if tokenizer.token_to_id(name) is not None:
            return name
    raise ValueError(f"the tokenizer in {folder} has no end-of-text token; looked for {', '.join(_EOS_NAMES)}")


def named_tokens(folder: str | Path) -> dict[str, str]:
    """The control tokens that `tokenizer_config.json` names: by role, as `pad_token`, or by key and position.

    Raises ValueError where that file is damaged.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        tokens = {role: config.get(role) for role in _ROLES}
        for key in _LISTS:
            listed = config.get(key) or []
            listed = listed.values() if isinstance(listed, dict) else listed
            tokens |= {f"{key}.{number}": name for number, name in enumerate(listed)}
        added = (config.get("added_tokens_decoder") or {}).items()
        tokens |= {f"added_tokens_decoder.{number}": token for number, token in added if token.get("special")}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f'{path} is damaged ({error}); expected {{"eos_token": "TEXT"}}') from None
    names = {key: name.get("content") if isinstance(name, dict) else name for key, name in tokens.items()}
    for key, name in names.items():
        if name is not None and not isinstance(name, str):
            raise ValueError(f'{path} is damaged ({key} is {name!r:.80}); expected {{"{key}": "TEXT"}}')
    return {key: name for key, name in names.items() if name}


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id: the rows an embedding needs, more than the tokens where ids have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def can_be_cut(tokenizer: Tokenizer) -> bool:
    """Whether a text may be cut before a space between two words: with the words of GPT-2 no token crosses it."""
    stored = json.loads(tokenizer.to_str())
    first = stored["pre_tokenizer"] or {}
    plain = stored["normalizer"] is None and all(token["special"] for token in stored["added_tokens"])
    by_words = first.get("type") == "ByteLevel" and not first["add_prefix_space"] and first.get("use_regex", True)
    return plain and by_words and tokenizer.encode_special_tokens


def cut(text: str, size: int | None) -> Iterator[str]:
    """Pieces of a text, of about so many characters; longer where there is no space between two words."""
    start = 0
    while size is not None and (gap := _BETWEEN_WORDS.search(text, start + size)):
        yield text[start : gap.start()]
        start = gap.start()
    yield text[start:]


def sample_texts(texts: Iterable[str], budget: int) -> list[str]:
    """A uniform sample of about `budget` bytes: the texts with the smallest hashes, in whatever order they come."""
    heap: list[tuple[int, str]] = []
    size = 0
    for text in texts:
        data = text.encode()
        heapq.heappush(heap, (-stable_id(data), text))
        size += len(data)
        while size > budget and len(heap) > 1:
            size -= len(heapq.heappop(heap)[1].encode())
    return [_cut(text, budget) for _, text in sorted(heap, reverse=True)]


def _cut(text: str, size: int) -> str:
    """The beginning of a text, of at most so many bytes."""
    return text if len(text) <= size // 4 else text.encode()[:size].decode(errors="ignore")


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
