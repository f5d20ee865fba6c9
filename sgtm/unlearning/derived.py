"""A run that is made of another one: what `sgtm unlearn` and `sgtm adapt` have in common.

The new directory appears when it is complete. It holds config.yaml (the source's, with name and place of its own), one
checkpoint of weights alone with the source's step, metrics.jsonl (the steps), a record of how it was made, and
environment.jsonl.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sgtm.config.errors import ConfigError
from sgtm.config.load import save_config
from sgtm.config.schema import RUN_NAME, Config
from sgtm.config.sections import SteeringConfig
from sgtm.data.store import Corpus
from sgtm.files import sha256_of, sync_directory
from sgtm.model.transformer import Transformer
from sgtm.process.names import did_you_mean
from sgtm.run.adapted import read_adapted
from sgtm.run.checkpoint import MANIFEST, read_manifest
from sgtm.run.environment import record_environment
from sgtm.run.evaluate import check_precision, load_model
from sgtm.run.located import SYNTHETIC, record_folder
from sgtm.run.unlearned import read_unlearned
from sgtm.unlearning.text import Sequences

LINES = 10  # that are printed of the steps


def check_out(out: Path) -> None:
    """Raises ValueError where `out` exists and is not an empty folder, or has a name that no run may have."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; give a new one with --out")
    if not re.fullmatch(RUN_NAME, out.name):
        raise ConfigError(f"--out {out}: a run directory has a name of letters, digits and . + - _; give another one")


def domain_of(config: Config, domain: str | None, run: Path) -> str:
    """The domain that is meant. Raises ValueError for one that the run lacks, and where it is not clear which."""
    domains = config.space.domains
    if domain is None and len(domains) == 1:
        return domains[0]
    if domain in domains:
        return domain
    if not domains:
        raise ValueError(f"{run} was trained without domains (masking.domains is empty)")
    known = ", ".join(domains)
    if domain is None:
        raise ValueError(f"{run} has the domains {known}; choose one with --domain")
    raise ValueError(f"{run} has no domain {domain!r}{did_you_mean(domain, domains)}; its domains are {known}")


def categories_of(corpus: Corpus, label: str) -> list[str]:
    """Categories of a true label. Raises ValueError where there is none."""
    if names := [category for category, true_label in corpus.categories.items() if true_label == label]:
        return names
    labelled = ", ".join(f"{category} ({name})" for category, name in corpus.categories.items())
    raise ValueError(f"{corpus.path} has no category with the label {label}; its categories are {labelled}")


def read_text(
    corpus: Corpus, config: Config, label: str, seed: int, read: bool = True
) -> tuple[list[str], Sequences | None]:
    """Categories of a true label, and their sequences; nothing where they are not to be read.

    Raises ValueError where there is no such category, and where one of them has no text in the split train.
    """
    if not read:
        return [], None
    categories = categories_of(corpus, label)
    return categories, Sequences(corpus, config, categories, seed)


def open_model(config: Config, checkpoint: Path) -> Transformer:
    """The full model in fp32 with nothing added, after the self-check of the kernels in that precision."""
    check_precision(config, "fp32")
    model = load_model(config, checkpoint)
    model.steering = None  # what is changed is the model that an export gives
    return model


def source_record(run: Path, config: Config, checkpoint: Path) -> dict:
    """What the record of a new run has of its source: name, checkpoint and its hash, and how it was made itself."""
    source = {"run": config.name, "checkpoint": checkpoint.name, "step": read_manifest(checkpoint)["step"]}
    earlier = {"unlearned": read_unlearned(run), "adapted": read_adapted(run)}
    source |= {"manifest_sha256": sha256_of(checkpoint / MANIFEST)}
    return source | {name: record for name, record in earlier.items() if record}


def own_config(config: Config, corpus: Corpus, out: Path) -> Config:
    """That of the new run, which finds the same corpus and adds no direction."""
    path, beside = config.data.path, Path(os.path.abspath(corpus.path))
    if path == SYNTHETIC and beside.parent != out.parent:
        path = str(beside)
    data = config.data.model_copy(update={"path": path})
    own = {"name": out.name, "runs": str(out.parent), "data": data, "steering": SteeringConfig()}
    return config.model_copy(update=own)


@contextmanager
def new_run(out: Path, config: Config, steps: int) -> Iterator[tuple[Path, Callable[[dict], None]]]:
    """The folder of a new run, to write checkpoint and record to, and what takes the line of every step.

    config  its own. The folder takes the place of `out` when the block ends; after an error it is gone.
    """
    with _filled(out) as folder:
        with (folder / "metrics.jsonl").open("w", encoding="utf-8", buffering=1) as file:
            yield folder, _line_log(file.write, steps)
        record_folder(folder)
        record_environment(folder)
        save_config(config, folder / "config.yaml")


def _line_log(write: Callable[[str], object], steps: int) -> Callable[[dict], None]:
    """Writes the lines as JSON, and prints about `LINES` of them."""
    every = max(1, steps // LINES)

    def line(values: dict) -> None:
        write(json.dumps(values) + "\n")
        if values["step"] % every == 0 or values["step"] == steps:
            parts = (f"{name} {value:.4g}" for name, value in values.items() if name.startswith(("loss", "distance")))
            print(f"step {values['step']}/{steps}  {'  '.join(parts)}")

    return line


@contextmanager
def _filled(out: Path) -> Iterator[Path]:
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, out)  # an empty folder is replaced
        sync_directory(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
