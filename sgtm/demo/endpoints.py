"""What the page asks for: completions and token losses of the full model, and without the domains that are off.

Every answer is JSON. What is wrong with a request is a ValueError with a sentence for the person at the page.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import isfinite
from typing import Any

from sgtm.inference.decoding import Interrupted, complete
from sgtm.inference.sources import ModelSource
from sgtm.inference.text_losses import passage, token_losses
from sgtm.inference.text_model import RunModel, open_run_model
from sgtm.report.coloured import coloured_passage
from sgtm.report.completions import described_end

COMPLETION_TOKENS = 256
"""Of a completion, at most."""
TEXT_TOKENS = 2048
"""Of a text whose losses are computed, at most."""
PATIENCE = 120.0
"""Seconds that a request waits for those before it."""


class Busy(Exception):
    """The model did not become free in time, or the program ends."""


class Demo:
    """One model in memory, which computes for one request at a time."""

    def __init__(self, source: ModelSource, full: RunModel):
        self.source, self.full = source, full
        self.domains = source.removable
        self._lock, self._ending = threading.Lock(), threading.Event()

    @classmethod
    def open(cls, source: ModelSource) -> Demo:
        """Of a run. Raises ValueError as `open_run_model`."""
        return cls(source, open_run_model(source))

    @property
    def ending(self) -> bool:
        """Whether `end` was called."""
        return self._ending.is_set()

    def complete(self, values: Any) -> dict[str, Any]:
        """{"completions": [{"name", "text", "length"}, ...]}: of the full model, and without the removed domains.

        values  {"prompt": text, "removed": list of domains, "tokens": 1 to `COMPLETION_TOKENS`}
        """
        prompt, removed, tokens = _fields(values, prompt=str, removed=list, tokens=int)
        if not 1 <= tokens <= COMPLETION_TOKENS:
            raise ValueError(f"tokens: {tokens} is out of range; give 1 to {COMPLETION_TOKENS}")
        models = self._models(removed)

        def run() -> dict[str, Any]:
            completions = [complete(model, prompt, tokens, interrupted=self._ending.is_set) for model in models]
            return {
                "completions": [
                    {"name": model.name, "text": completion.text, "length": described_end(completion)}
                    for model, completion in zip(models, completions, strict=True)
                ]
            }

        return self._alone(run)

    def losses(self, values: Any) -> dict[str, Any]:
        """{"means": [{"name", "nats"}, ...], "tokens": [{"text", "direction", "shade", "tooltip", "losses"}, ...]}:
        `losses` has one of each model, null where nothing predicts the token.

        values  {"text": text, "removed": list of domains}
        """
        text, removed = _fields(values, text=str, removed=list)
        models, ids = self._models(removed), self.full.encode(text)
        if not 2 <= len(ids) <= TEXT_TOKENS:
            raise ValueError(f"text: it has {len(ids):,} tokens; give 2 to {TEXT_TOKENS:,}")

        def run() -> dict[str, Any]:
            by_model = {model.name: token_losses(model, ids) for model in models}
            of_text = passage(self.full, "text", ids, by_model)
            means = [(name, float(values.double().mean())) for name, values in by_model.items()]
            columns = zip(*of_text["losses"].values(), strict=True)
            return {
                "means": [{"name": name, "nats": mean if isfinite(mean) else None} for name, mean in means],
                "tokens": [
                    {**token._asdict(), "losses": losses}
                    for token, losses in zip(coloured_passage(of_text).tokens, columns, strict=True)
                ],
            }

        return self._alone(run)

    def end(self, seconds: float = 5.0) -> None:
        """Refuse what is asked for from now on, and wait for what is being computed."""
        self._ending.set()
        self._lock.acquire(timeout=seconds)

    def _models(self, removed: list) -> list[RunModel]:
        """The full one, and that without these domains."""
        if not all(isinstance(domain, str) for domain in removed):
            raise ValueError("removed: must be a list of strings")
        domains = self.source.removed(removed)
        return [self.full, *([self.full.without(domains)] if domains else [])]

    def _alone(self, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if self.ending or not self._lock.acquire(timeout=PATIENCE):
            raise Busy
        try:
            if self.ending:
                raise Busy
            return run()
        except Interrupted:
            raise Busy from None
        finally:
            self._lock.release()


def _fields(values: Any, **types: type) -> tuple[Any, ...]:
    """The values of these fields. Raises ValueError unless there are these and no others, each of its type."""
    words = {str: "a string", list: "a list of strings", int: "a whole number"}
    if not isinstance(values, dict) or values.keys() != types.keys():
        raise ValueError(f"must be a JSON object with {', '.join(types)} and nothing else")
    for name, kind in types.items():
        if not isinstance(values[name], kind) or isinstance(values[name], bool):
            raise ValueError(f"{name}: must be {words[kind]}")
    return tuple(values[name] for name in types)
