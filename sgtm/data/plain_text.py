"""Text is text: a tokenizer from whose ids no text can make a control token, such as the end of a document.

Tokenizers turn the string of a control token into its id in three ways: an added token that is not declared special is
cut out of the text; a model finds it as an ordinary piece; a template puts it in front of the text or behind it. Here
each of them ends, and the ids of all tokens stay. What is left (an end-of-text token of a single character, or one that
also stands for unknown characters) the encoder refuses with file and line.

The promise: the ids of a text hold no control id, and no other text is encoded in another way than before
(`tests/unit/test_plain_text.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from tokenizers import Tokenizer


def plain_text(tokenizer: Tokenizer, controls: Iterable[str]) -> Tokenizer:
    """The same vocabulary as a tokenizer of text alone: nothing cut, padded, added or drawn at random.

    controls  names of control tokens, beside those that the tokenizer declares special or that its template adds;
              unknown ones, and single characters that are no added tokens, are passed over

    Set `encode_special_tokens` where the result is loaded again: no file holds it.
    """
    state = json.loads(tokenizer.to_str())
    ids = _known(tokenizer, state, controls)
    state |= {"truncation": None, "padding": None, "post_processor": _without_templates(state["post_processor"])}
    if "dropout" in state["model"]:
        state["model"]["dropout"] = None
    _declare(state, ids)
    state["pre_tokenizer"] = _spelling_out(state["pre_tokenizer"], _pieces(state["model"], ids))
    return as_text(Tokenizer.from_str(json.dumps(state)))


def reachable(tokenizer: Tokenizer, controls: Iterable[str]) -> list[str]:
    """The control tokens that a text could have before `plain_text`, special tokens being spelled out."""
    state = json.loads(tokenizer.to_str())
    ids = _known(tokenizer, state, controls)
    undeclared = {token["content"] for token in state["added_tokens"] if not token["special"]} & ids.keys()
    return sorted(undeclared.union(_pieces(state["model"], ids)))


def as_text(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, set to spell out special tokens in a text, to cut nothing and to add no padding."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def control_ids(tokenizer: Tokenizer, eos_id: int) -> frozenset[int]:
    """Ids that no text may have: the EOS and all special tokens, but for the one that stands for what is unknown."""
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    unknown = tokenizer.token_to_id(unknown_token(tokenizer) or "")
    return frozenset(special - {unknown} | {eos_id})


def unknown_token(tokenizer: Tokenizer) -> str | None:
    """What stands for characters that the vocabulary lacks; None where there is no such token."""
    return _unknown(json.loads(tokenizer.to_str())["model"])


def _unknown(model: dict) -> str | None:
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token") or None


def _known(tokenizer: Tokenizer, state: dict, controls: Iterable[str]) -> dict[str, int]:
    """Ids of the control tokens that the vocabulary has."""
    controls = set(controls)
    names = {name for name in controls if len(name) > 1} | _declared(state)
    names |= {token["content"] for token in state["added_tokens"]} & controls
    ids = {name: tokenizer.token_to_id(name) for name in names}
    return {name: i for name, i in ids.items() if i is not None}


def _declared(state: dict) -> set[str]:
    """Tokens that the tokenizer itself treats as control tokens."""
    names = {token["content"] for token in state["added_tokens"] if token["special"]}
    unknown = _unknown(state["model"])
    if unknown and len(unknown) > 1:
        names.add(unknown)
    for processor in _members(state["post_processor"], "processors"):
        names |= set(processor.get("special_tokens", ()))
        names |= {processor[key][0] for key in ("sep", "cls") if key in processor}
    return names


def _declare(state: dict, ids: dict[str, int]) -> None:
    """Makes special tokens of the names, in place."""
    for token in state["added_tokens"]:
        token["special"] |= token["content"] in ids
    for name in ids.keys() - {token["content"] for token in state["added_tokens"]}:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        state["added_tokens"].append({"id": ids[name], "content": name, **flags, "special": True})
    state["added_tokens"].sort(key=lambda token: token["id"])


def _without_templates(processor: dict | None) -> dict | None:
    """What is left of a post-processor without the parts that add tokens: the trimming of offsets."""
    members = [member for member in _members(processor, "processors") if member["type"] == "ByteLevel"]
    members += [
        {"type": "ByteLevel", "add_prefix_space": member["add_prefix_space"], "trim_offsets": True, "use_regex": True}
        for member in _members(processor, "processors")
        if member["type"] == "RobertaProcessing" and member["trim_offsets"]
    ]
    return _sequence(members, "processors")


def _pieces(model: dict, names: Iterable[str]) -> list[str]:
    """Those that the model may make of a text and that can be cut in two."""
    vocabulary = model["vocab"]
    if model["type"] == "BPE":
        made = {"".join(merge) for merge in model["merges"]}
        if model["ignore_merges"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
            made |= vocabulary.keys()
    else:
        made = set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    return sorted(name for name in names if len(name) > 1 and name in made)


def _spelling_out(pre_tokenizer: dict | None, pieces: list[str]) -> dict | None:
    """The pre-tokenizer, and behind it a cut after the first character of each of these pieces."""
    if not pieces:
        return pre_tokenizer
    rests = {first: [re.escape(piece[1:]) for piece in pieces if piece[0] == first] for first in {p[0] for p in pieces}}
    pattern = "|".join(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in sorted(rests.items()))
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    members = _members(pre_tokenizer, "pretokenizers")
    return _sequence(members if cut in members else [*members, cut], "pretokenizers")


def _members(part: dict | None, key: str) -> list[dict]:
    """A part of the tokenizer as a list; sequences may lie in sequences."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [member for inner in part[key] for member in _members(inner, key)]


def _sequence(members: list[dict], key: str) -> dict | None:
    if len(members) < 2:
        return members[0] if members else None
    return {"type": "Sequence", key: members}
