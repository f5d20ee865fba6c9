"""A run that is opened to be examined or attacked: its newest checkpoint, and the corpus that it was trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sgtm.config import Config
from sgtm.data.loader import isolates_documents
from sgtm.data.store import Corpus
from sgtm.data.trained import trained_tokens
from sgtm.distributed.env import device_type, use_deterministic_algorithms
from sgtm.evaluation.subject import Subject
from sgtm.run.adapters import adapted_domain
from sgtm.run.checkpoint import open_run, read_manifest
from sgtm.run.evaluate import check_precision, load_model, open_run_corpus
from sgtm.run.unlearned import read_unlearned
from sgtm.words import listed


@dataclass(frozen=True)
class OpenedRun:
    """weights  digest of the checkpoint's files"""

    run: Path
    config: Config
    checkpoint: Path
    corpus: Corpus
    weights: str

    @property
    def removable(self) -> tuple[str, ...]:
        """Domains without which there is a model: one in adapters, else those with a group; none without masks."""
        if (domain := adapted_domain(self.checkpoint)) is not None:
            return (domain,)
        return tuple(self.config.masking.domains) if self.config.removals[1:] else ()

    def removed(self, domains: Sequence[str]) -> tuple[str, ...]:
        """What an attacker gets the model without: the domains, or nothing of a model trained without masks; of an
        adapted run the one in adapters, where it is among them.
        """
        if adapted_domain(self.checkpoint) is not None:
            return tuple(domain for domain in domains if domain in self.removable)
        return () if self.config.removals == [()] else tuple(domains)

    def subject(self, removed: Sequence[str]) -> Subject:
        """In fp32; removed: as `removed` gives it. The self-check of the kernels comes first, as in an evaluation."""
        if device_type() == "cuda" and self.config.kernels.deterministic:
            use_deterministic_algorithms()
        check_precision(self.config, "fp32")
        base = bool(removed) and adapted_domain(self.checkpoint) is not None
        model = load_model(self.config, self.checkpoint, adapters=not base)
        return Subject(model, self.corpus, self.config, () if base else tuple(removed))


def open_with_corpus(run: str | Path, data: str | None = None) -> OpenedRun:
    """The newest valid checkpoint of a run, with its corpus; data: `data.path` to take instead of the run's.

    Raises ValueError for a folder that is no run, one without checkpoint, and a corpus that is gone or another one.
    """
    run = Path(run)
    config, checkpoint = open_run(run, data)
    manifest = read_manifest(checkpoint)
    weights = hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()
    return OpenedRun(run, config, checkpoint, open_run_corpus(config, run, manifest), weights)


def check_same_sequences(target: OpenedRun, other: OpenedRun) -> None:
    """Raises ValueError unless losses of the two runs are of the same sequences."""
    if target.corpus.fingerprint != other.corpus.fingerprint:
        raise ValueError(
            f"{other.run} was trained on {other.corpus.path}, {target.run} on {target.corpus.path}: losses are "
            f"compared on one corpus; leave categories out of a run with data.upsample"
        )
    settings = [(t.config.model.context, isolates_documents(t.config.data)) for t in (target, other)]
    if settings[0] != settings[1]:
        raise ValueError(
            f"{other.run} has model.context {settings[1][0]}{' and isolated documents' * settings[1][1]}, {target.run} "
            f"{settings[0][0]}{' and isolated documents' * settings[0][1]}: their losses are of other sequences; train "
            f"the second with the settings of the first"
        )


def check_control(target: OpenedRun, control: OpenedRun) -> None:
    """Raises ValueError unless a control is another run, of the same sequences."""
    if control.run.resolve() == target.run.resolve():
        raise ValueError(f"{control.run} is the run itself; a control is another run, trained without the domain")
    check_same_sequences(target, control)


def knowing_control(control: OpenedRun, domains: Sequence[str]) -> str:
    """A warning where a run that stands for a model without the domains was trained on them, or may have been by what
    it began with; else empty."""
    unlearned = read_unlearned(control.run) or {"source": {}}
    adapters = unlearned["source"].get("adapted") or {}
    if adapters.get("domain") in domains:
        return f"the control {control.run} was unlearned from a run with adapters of {adapters['domain']}"
    if control.config.train.init_from:
        weights = control.config.train.init_from
        return f"the control {control.run} began with the weights of {weights}, which may have seen {listed(domains)}"
    for domain in domains:
        trained = trained_tokens(control.corpus, control.config).get(f"forget:{domain}", {})
        if tokens := round(sum(trained.values())):
            return (
                f"the control {control.run} was trained on {tokens:,} tokens of {domain}: it does not show what a "
                f"model without {domain} gives"
            )
    return ""
