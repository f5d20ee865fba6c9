"""Subjects of the measures whose every logit follows from a rule, in the place of a trained model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from sgtm.evaluation.subject import Hidden, Scores


class Rule:
    """A subject whose hidden states are any function of the tokens before.

    states  int64 [B, S] ids -> [B, S, D]
    weight  [V, D] of the head
    """

    device = torch.device("cpu")

    def __init__(self, states: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor, context: int = 64):
        self.states, self.weight = states, weight
        self.config = SimpleNamespace(model=SimpleNamespace(context=context, vocab_size=len(weight)))

    def plan(self, input_ids: torch.Tensor) -> None:
        return None

    def hidden(self, input_ids: torch.Tensor, plan: None = None) -> Hidden:
        return Hidden(self.states(input_ids).flatten(0, 1), self.weight, None)


def bigram(logits: torch.Tensor, **options) -> Rule:
    """The logits of the next token, [V, V], by the last one alone."""
    return Rule(lambda ids: F.one_hot(ids, len(logits)).float(), logits.t().contiguous(), **options)


def scores(losses: list[list[float]]) -> Scores:
    """Losses by document."""
    number = torch.tensor([i for i, document in enumerate(losses) for _ in document])
    flat = torch.tensor([loss for document in losses for loss in document])
    return Scores(flat, flat < 0, number)
