"""What the demo's page asks for: the same completions and losses as elsewhere, one request at a time."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from exports import GPT_NEO
from text_models import byte_run

from sgtm.demo import endpoints
from sgtm.demo.endpoints import Busy, Demo
from sgtm.inference.decoding import complete
from sgtm.inference.sources import find_model
from sgtm.inference.text_losses import token_losses
from sgtm.inference.text_model import open_models


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return byte_run(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def demo(run) -> Demo:
    return Demo.open(find_model(run))


def test_completions_are_those_of_the_two_models(demo, run):
    answer = demo.complete({"prompt": "El", "removed": ["fr", "es"], "tokens": 6})
    models = open_models(find_model(run), [(), ("es", "fr")])
    assert [(of["name"], of["text"]) for of in answer["completions"]] == [
        (model.name, complete(model, "El", 6).text) for model in models
    ]
    assert answer["completions"][0]["text"] != answer["completions"][1]["text"]
    assert answer["completions"][0]["length"].startswith("6 token")
    assert [of["name"] for of in demo.complete({"prompt": "El", "removed": [], "tokens": 1})["completions"]] == ["full"]


def test_losses_are_those_of_the_two_models(demo, run):
    text = "El año que viene, dijo."
    answer = demo.losses({"text": text, "removed": ["es"]})
    models = open_models(find_model(run), [(), ("es",)])
    full, without = (token_losses(model, model.encode(text)) for model in models)
    assert answer["means"] == [
        {"name": "full", "nats": pytest.approx(float(full.mean()))},
        {"name": "without es", "nats": pytest.approx(float(without.mean()))},
    ]
    first, *tokens = answer["tokens"]
    assert "".join(token["text"] for token in answer["tokens"]) == text and list(first["losses"]) == [None, None]
    for token, before, after in zip(tokens, full.tolist(), without.tolist(), strict=True):
        assert token["losses"] == (round(before, 4), round(after, 4))
        assert token["direction"] == ("up" if after > before else "down")
    json.dumps(answer, allow_nan=False)


def test_losses_of_the_full_model_alone_have_no_colour(demo):
    answer = demo.losses({"text": "El año", "removed": []})
    assert len(answer["means"]) == 1 and {token["direction"] for token in answer["tokens"]} == {""}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "must be a JSON object with prompt, removed, tokens and nothing else"),
        ({"prompt": "a", "removed": []}, "must be a JSON object with prompt, removed, tokens and nothing else"),
        ({"prompt": "a", "removed": [], "tokens": 1, "more": 1}, "and nothing else"),
        ({"prompt": 1, "removed": [], "tokens": 1}, "prompt: must be a string"),
        ({"prompt": "a", "removed": "es", "tokens": 1}, "removed: must be a list of strings"),
        ({"prompt": "a", "removed": [1], "tokens": 1}, "removed: must be a list of strings"),
        ({"prompt": "a", "removed": [["es"]], "tokens": 1}, "removed: must be a list of strings"),
        ({"prompt": "a", "removed": ["it"], "tokens": 1}, "unknown domain 'it'; known domains: es, fr"),
        ({"prompt": "a", "removed": [], "tokens": 1.5}, "tokens: must be a whole number"),
        ({"prompt": "a", "removed": [], "tokens": True}, "tokens: must be a whole number"),
        ({"prompt": "a", "removed": [], "tokens": 0}, "tokens: 0 is out of range; give 1 to 256"),
        ({"prompt": "a", "removed": [], "tokens": 257}, "tokens: 257 is out of range; give 1 to 256"),
        ({"prompt": "", "removed": [], "tokens": 1}, "the prompt is empty"),
        (
            {"prompt": "a" * 16, "removed": [], "tokens": 1},
            "the prompt has 16 tokens, and the context of full holds 16",
        ),
        ({"prompt": "\udfff", "removed": [], "tokens": 1}, "half a surrogate pair"),
    ],
)
def test_a_wrong_completion_request_is_a_sentence(demo, values, message):
    with pytest.raises(ValueError, match=message):
        demo.complete(values)
    assert not demo._lock.locked()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": "abc"}, "must be a JSON object with text, removed and nothing else"),
        ({"text": "a", "removed": []}, "text: it has 1 tokens; give 2 to 2,048"),
        ({"text": "a" * 2049, "removed": []}, "text: it has 2,049 tokens; give 2 to 2,048"),
        ({"text": "a\ud800", "removed": []}, "half a surrogate pair"),
    ],
)
def test_a_wrong_request_for_losses_is_a_sentence(demo, values, message):
    with pytest.raises(ValueError, match=message):
        demo.losses(values)


def test_a_run_without_masks_has_no_domains(tmp_path):
    demo = Demo.open(find_model(byte_run(tmp_path, GPT_NEO.replace("masking: {", "masking: {strategy: none, "))))
    assert demo.domains == ()
    with pytest.raises(ValueError, match="was trained without masks"):
        demo.losses({"text": "abc", "removed": ["es"]})


def test_requests_are_computed_one_at_a_time(demo, monkeypatch):
    inside, most = [], []
    begun, go_on = threading.Event(), threading.Event()

    def slow(*arguments, **options):
        inside.append(1)
        most.append(len(inside))
        begun.set()
        go_on.wait(20)
        inside.pop()
        return complete(*arguments, **options)

    monkeypatch.setattr(endpoints, "complete", slow)
    ask = {"prompt": "El", "removed": [], "tokens": 1}
    threads = [threading.Thread(target=demo.complete, args=(ask,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(20)
    monkeypatch.setattr(endpoints, "PATIENCE", 0.01)
    with pytest.raises(Busy):
        demo.complete(ask)
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert most == [1, 1, 1]


def test_the_end_waits_for_a_completion_which_is_cut_short(demo, monkeypatch):
    begun, outcome = threading.Event(), []
    original = demo.full.__class__.logits

    def noted(self, ids, last=False):
        begun.set()
        return original(self, ids, last)

    monkeypatch.setattr(demo.full.__class__, "logits", noted)

    def ask():
        try:
            while True:
                demo.complete({"prompt": "El", "removed": ["es"], "tokens": 13})
        except Busy:
            outcome.append("busy")

    thread = threading.Thread(target=ask)
    thread.start()
    assert begun.wait(20)
    demo.end()
    thread.join(20)
    assert outcome == ["busy"] and demo.ending and demo._lock.locked()
