"""Completions of a prompt, token by token: greedy, or drawn from the model's distribution.

Every token reads the whole text again: nothing is cached, so a completion of n tokens costs n forward passes. That is
for looking at a model; to serve one, export it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch

from sgtm.evaluation.passages import token_texts
from sgtm.inference.text_model import TextModel


class Sampling(NamedTuple):
    """temperature: the logits are divided by it; 0 is greedy, the most likely token. top_k: draw from so many most
    likely tokens; None: from all. seed: of the draws, which are the same for every prompt and model."""

    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0


GREEDY = Sampling()


class Completion(NamedTuple):
    """What follows the prompt. ids: its tokens. ended: by `tokens` (as many as wanted), `end` (the model has ended the
    text; that token is left out) or `context` (which is full)."""

    text: str
    ids: list[int]
    ended: Literal["tokens", "end", "context"]


class Interrupted(Exception):
    """A completion was not wanted any more."""


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError for a temperature below 0 or not finite, for a top-k below 1, and for one that is greedy."""
    temperature, top_k, _ = sampling
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature {temperature:g}: expected a number from 0 (greedy) on")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top-k {top_k}: expected a whole number above 0")
    if top_k is not None and temperature == 0:
        raise ValueError(f"top-k {top_k} draws tokens, and temperature 0 draws none; set a temperature above 0")


def encode_prompt(model: TextModel, prompt: str) -> list[int]:
    """Raises ValueError for an empty prompt, and for one that leaves no room for another token in the context."""
    ids = model.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty; give at least one token")
    if len(ids) >= model.context:
        raise ValueError(
            f"the prompt has {len(ids):,} tokens, and the context of {model.name} holds {model.context:,}, the "
            f"completion included; shorten it to {model.context - 1:,}"
        )
    return ids


@torch.no_grad()
def complete(
    model: TextModel,
    prompt: str,
    tokens: int,
    sampling: Sampling = GREEDY,
    interrupted: Callable[[], bool] = lambda: False,
) -> Completion:
    """Up to `tokens` tokens after the prompt.

    interrupted  is called before every token; `Interrupted` is raised where it returns True

    Raises ValueError as `check_sampling` and `encode_prompt`.
    """
    check_sampling(sampling)
    before = encode_prompt(model, prompt)
    generator = torch.Generator().manual_seed(sampling.seed)
    ids: list[int] = []
    ended: Literal["tokens", "end", "context"] = "tokens"
    for _ in range(tokens):
        if interrupted():
            raise Interrupted
        if len(before) + len(ids) == model.context:
            ended = "context"
            break
        token = _next(model.logits([*before, *ids], last=True), model.vocabulary, sampling, generator)
        if token == model.eos_id:
            ended = "end"
            break
        ids.append(token)
    text = "".join(token_texts(model.tokenizer, [*before, *ids])[len(before) :])
    return Completion(text, ids, ended)


def _next(
    logits: Iterable[tuple[slice, torch.Tensor]], vocabulary: int, sampling: Sampling, generator: torch.Generator
) -> int:
    """logits: of one token, [1, V]; those from `vocabulary` on stand for no token."""
    ((_, rows),) = logits
    values = rows[0, :vocabulary].cpu()
    if sampling.temperature == 0:
        return int(values.argmax())
    if sampling.top_k is not None and sampling.top_k < len(values):
        likeliest, indices = values.topk(sampling.top_k)
    else:
        likeliest, indices = values, torch.arange(len(values))
    probabilities = (likeliest.double() / sampling.temperature).softmax(-1)
    return int(indices[torch.multinomial(probabilities, 1, generator=generator)])
