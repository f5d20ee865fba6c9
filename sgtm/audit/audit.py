"""Every check of an exported folder against its run, in order; a check that cannot be made is named with the reason."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from transformers import PretrainedConfig

from sgtm.audit import behaviour, facts, files, tensors
from sgtm.audit.check import Check, Skipped
from sgtm.audit.record import read_export_record
from sgtm.config import Config
from sgtm.config.load import load_run_config
from sgtm.data.store import Corpus
from sgtm.files import sha256_of
from sgtm.hf.card import RECORD
from sgtm.hf.export import DTYPES, ControlTokens, save_tokenizer
from sgtm.hf.weights import Conversion
from sgtm.run.adapters import adapted_domain, weights_of
from sgtm.run.checkpoint import MANIFEST, checkpoints_dir, read_manifest
from sgtm.run.evaluate import open_run_corpus
from sgtm.run.located import locate_data


@dataclass
class Audited:
    """An exported folder and the run that it is held against; what a check needs of either is read when it needs it.

    scratch  an empty folder, for what an export would write
    """

    folder: Path
    run: Path
    record: dict
    config: Config
    scratch: Path

    @cached_property
    def checkpoint(self) -> Path:
        return checkpoints_dir(self.run) / self.record["checkpoint"]["name"]

    @cached_property
    def manifest(self) -> dict:
        return read_manifest(self.checkpoint)

    @cached_property
    def groups(self) -> list[str]:
        """Domains whose groups were removed: none where the domain is in adapters."""
        return [] if adapted_domain(self.checkpoint) else self.record["removed"]

    @cached_property
    def conversion(self) -> Conversion:
        reduced, pruned = self.record["reduced"], self.record["pruned"]
        made = Conversion(self.config.model, self.config.partition, self.groups, reduced, pruned)
        made.config.dtype = DTYPES[self.record["dtype"]]
        return made

    @cached_property
    def weights(self) -> tensors.StoredTensors:
        return tensors.StoredTensors(self.folder)

    @cached_property
    def corpus(self) -> Corpus:
        """Raises Skipped where it cannot be read."""
        try:
            return open_run_corpus(self.config, self.run, self.manifest)
        except (ValueError, OSError) as error:
            raise Skipped(f"the corpus cannot be read: {error}") from None

    @cached_property
    def control_tokens(self) -> ControlTokens:
        """Of the corpus's tokenizer, which is then in `scratch` as an export would write it.

        Raises Skipped where there is none.
        """
        if not self.record["tokenizer"]:
            raise Skipped("exported without a tokenizer")
        _ = self.corpus
        control = save_tokenizer(self.run, self.config, self.manifest, self.scratch)
        assert control is not None  # the corpus can be read
        return control

    @cached_property
    def model_config(self) -> PretrainedConfig:
        """As an export would write it; without control tokens where no tokenizer can be read."""
        config = copy.deepcopy(self.conversion.config)
        with suppress(Skipped):
            self.control_tokens.enter(config)
        return config

    @property
    def has_tokenizer(self) -> bool:
        """Whether the export has one that can be held against the corpus's."""
        try:
            return self.control_tokens is not None
        except Skipped:
            return False


def _files(a: Audited) -> list[str]:
    return files.file_problems(a.folder, a.record)


def _checkpoint(a: Audited) -> list[str]:
    return facts.checkpoint_problems(a.run, a.record)


def _facts(a: Audited) -> list[str]:
    return facts.fact_problems(a.folder, a.record, a.run, a.config, a.checkpoint, a.model_config)


def _config(a: Audited) -> list[str]:
    unknown = ("eos_token_id", "pad_token_id") if a.record["tokenizer"] and not a.has_tokenizer else ()
    return facts.config_problems(a.folder, a.record, a.model_config, a.scratch, unknown)


def _tokenizer(a: Audited) -> list[str]:
    _ = a.control_tokens
    return facts.tokenizer_problems(a.folder, a.scratch)


def _tensors(a: Audited) -> list[str]:
    expected = a.conversion.tensors(weights_of(a.checkpoint, adapters=not a.record["removed"]))
    return tensors.layout_problems(a.weights) + tensors.value_problems(a.weights, expected, DTYPES[a.record["dtype"]])


def _removed(a: Audited) -> list[str]:
    if not a.groups:
        raise Skipped("no group was removed")
    state, dtype = weights_of(a.checkpoint), DTYPES[a.record["dtype"]]
    return tensors.removed_vectors(a.weights, a.config, state, a.groups, dtype)


def _logits(a: Audited) -> list[str]:
    return behaviour.logit_problems(a.folder, a.record, a.config, a.checkpoint, a.groups)


def _losses(a: Audited) -> list[str]:
    if not a.record["losses"]:
        raise Skipped("the card has no losses")
    return behaviour.loss_problems(a.folder, a.record, a.config, a.checkpoint, a.corpus)


class Entry(NamedTuple):
    """A check to be made.

    about        what holds where it passes
    problems     that it finds
    of_run       whether it holds the export against the run's checkpoint
    runs_model   whether it takes as long as a model does
    """

    about: str
    problems: Callable[[Audited], list[str]]
    of_run: bool = True
    runs_model: bool = False


CHECKPOINT = "checkpoint"
CHECKS = {
    "files": Entry("the files that the record lists, of its sizes and hashes, and no others", _files, of_run=False),
    CHECKPOINT: Entry(
        "the one in the record, and every file has the size and hash in its manifest", _checkpoint, of_run=False
    ),
    "facts": Entry("what record and card say follows from the run", _facts),
    "config": Entry("config.json and generation_config.json are those of the model", _config),
    "tokenizer": Entry("it is the corpus's", _tokenizer),
    "tensors": Entry("all by name, shape, dtype and bytes, each bit as the checkpoint has it", _tensors),
    "removed": Entry("no row or column is a weight vector of a removed group", _removed),
    "logits": Entry(
        "transformers computes what the run's model does without the removed groups", _logits, runs_model=True
    ),
    "losses": Entry("on held-out text the two models have those of the card", _losses, runs_model=True),
}
"""In the order in which they are made: those of the run after its checkpoint."""
COSTLY = tuple(name for name, entry in CHECKS.items() if entry.runs_model)


@dataclass(frozen=True)
class Audit:
    """chain  (SHA-256, file) of the checkpoint's files and manifest and of the export's files, as `sha256sum` has them;
    empty without the checkpoint
    """

    folder: Path
    run: Path
    record: dict
    checks: list[Check] = field(default_factory=list)
    chain: list[tuple[str, Path]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def has_checkpoint(self) -> bool:
        """Whether nothing was wrong with the run's checkpoint, where that has been checked."""
        return all(check.passed for check in self.checks if check.name == CHECKPOINT)


def audit_export(
    folder: str | Path,
    run: str | Path,
    data: str | None = None,
    *,
    skip: Sequence[str] = (),
    note: Callable[[Check], None] = lambda check: None,
) -> Audit:
    """Hold an exported folder against the run that it was made from.

    data  `data.path` to take; None: that of the run, whatever the working directory
    skip  names of checks that are not made
    note  is called with every check when it is finished

    Raises ValueError where the folder has no record of an export, and for a run directory that is none. Everything else
    that is wrong is a problem of a check.
    """
    folder, run = Path(folder), Path(run)
    record = read_export_record(folder)
    config = locate_data(load_run_config(run), run, data)
    audit = Audit(folder, run, record)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        audited = Audited(folder, run, record, config, scratch)
        for name, entry in CHECKS.items():
            check = Check(name, entry.about)
            try:
                if name in skip:
                    raise Skipped("--skip")
                if entry.of_run and not audit.has_checkpoint:
                    raise Skipped("there is no checkpoint to hold it against")
                check.problems += entry.problems(audited)
            except Skipped as reason:
                check.skipped = str(reason)
            except Exception as error:  # a damaged file may break any reader: the next checks run all the same
                check.problems.append(f"{folder}: {str(error) or repr(error)}")
            audit.checks.append(check)
            note(check)
        if audit.has_checkpoint:
            audit.chain.extend(_chain(audited))
    return audit


def _chain(a: Audited) -> list[tuple[str, Path]]:
    return [
        *((entry["sha256"], a.checkpoint / name) for name, entry in sorted(a.manifest["files"].items())),
        (a.record["checkpoint"]["manifest_sha256"], a.checkpoint / MANIFEST),
        *((entry["sha256"], a.folder / name) for name, entry in sorted(a.record["files"].items())),
        (sha256_of(a.folder / RECORD), a.folder / RECORD),
    ]
