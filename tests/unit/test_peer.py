"""Hugging Face's step, and the answers of its process; tests/processes/test_bench.py starts one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sgtm.config import load_config
from sgtm.measure import peer
from sgtm.measure.peer import Peer, hugging_face_step, peers


@pytest.mark.parametrize("precision", peer.PRECISIONS)
def test_the_step_trains_one_batch_of_a_step(precision, monkeypatch):
    """The same tokens again and again, whose loss therefore falls."""
    options = ["--train.tokens_per_step=128", "--train.micro_batch=1", "--optimizer.lr=0.01", "--model.layers=1"]
    shapes, original = [], torch.randint

    def recorded(high: int, size: tuple, **options) -> torch.Tensor:
        shapes.append(size)
        return original(high, size, **options)

    monkeypatch.setattr(torch, "randint", recorded)
    torch.manual_seed(0)
    step, attention = hugging_face_step(load_config("debug", options), precision)
    assert attention == "eager" and shapes == [(2, 64)]
    losses = [step() for _ in range(6)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.5


class Pipe:
    """An end of a pipe whose other end has these answers, and is closed after them."""

    def __init__(self, *answers: object):
        self.answers, self.questions = list(answers), []

    def send(self, question: str) -> None:
        self.questions.append(question)

    def recv(self) -> object:
        if not self.answers:
            raise EOFError
        return self.answers.pop(0)


def peer_with(*answers: object) -> Peer:
    mine = object.__new__(Peer)
    mine.ask, mine.process = Pipe(*answers), SimpleNamespace(join=lambda seconds: None, exitcode=-9)
    return mine


def test_an_answer_is_returned_an_error_raised_and_an_end_shown_with_its_status():
    mine = peer_with((1.0, 2.0), 7.5, "sdpa", RuntimeError("no such shape"))
    assert (mine.step(), mine.peak(), mine.attention()) == ((1.0, 2.0), 7.5, "sdpa")
    assert mine.ask.questions == ["step", "peak", "attention"]
    with pytest.raises(RuntimeError, match="no such shape"):
        mine.step()
    with pytest.raises(RuntimeError, match="the process of Hugging Face's model exited with -9"):
        mine.step()


def test_there_is_a_peer_for_each_precision(monkeypatch):
    monkeypatch.setattr(peer, "Peer", lambda config, precision: precision)
    assert peers(load_config("debug")) == {
        "Hugging Face, bf16 autocast": "bf16 autocast",
        "Hugging Face, bf16 weights": "bf16 weights",
    }
