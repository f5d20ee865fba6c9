"""The last steps of a certified run, trained again on other text of the removed domains.

A certificate says that the safe model does not depend, in any bit, on what the domains' documents say. The replay tests
the training that took place and not the config: it starts at a checkpoint that the run kept, puts random tokens in the
place of every token of the domains' documents but their ends, trains to the last step as the run did, and compares the
safe model bit for bit with the one that the run left. Where the training let a domain's text into it, in these steps,
they differ.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sgtm.audit.audit import Audit
from sgtm.audit.check import Check
from sgtm.config import Config
from sgtm.config.load import load_run_config, save_config
from sgtm.data.open import open_corpus
from sgtm.data.store import MANIFEST as CORPUS_MANIFEST
from sgtm.data.store import Corpus
from sgtm.files import sha256_of
from sgtm.hf.weights import Conversion
from sgtm.run.adapters import weights_of
from sgtm.run.checkpoint import checkpoints_dir, finished, read_manifest, step_of, write_manifest
from sgtm.run.located import locate_data
from sgtm.words import listed

SEED = 20251205


def replay(audit: Audit, steps: int, data: str | None = None) -> Check:
    """Train the last `steps` steps of the audited run again, in a process of its own for every rank that the run had,
    and compare the safe model.

    Raises ValueError where that is no test: a run that is not certified for what was removed, a checkpoint that is not
    the run's last, none that was kept `steps` steps before it, a run on several machines.
    """
    removed = audit.record["removed"]
    config = locate_data(load_run_config(audit.run), audit.run, data)
    first, last = _checkpoints(audit, config, steps)
    check = Check("replay", f"{steps} steps again, with random tokens for the text of {listed(removed)}")
    with tempfile.TemporaryDirectory(dir=audit.run.resolve().parent, prefix=".replay-") as scratch:
        run = _copy_of_run(Path(scratch), config, first, removed)
        ranks = read_manifest(first)["ranks"]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launcher, "-m", "sgtm", "train", str(run), "--resume"]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "WANDB_MODE": "disabled"}
        )
        again = checkpoints_dir(run) / last.name
        if done.returncode or not again.is_dir():
            raise ValueError(f"the replay failed (exit status {done.returncode}):\n{done.stderr.strip()[-2000:]}")
        check.problems += _differences(config, removed, last, again)
    return check


def replayed(audit: Audit, steps: int, data: str | None = None) -> Check:
    """The check of `replay`; where it is no test, or fails, that is its problem."""
    try:
        return replay(audit, steps, data)
    except ValueError as error:
        return Check("replay", f"{steps} steps again", [str(error)])


def _checkpoints(audit: Audit, config: Config, steps: int) -> tuple[Path, Path]:
    """Where the replay begins and ends."""
    removed, last = audit.record["removed"], checkpoints_dir(audit.run) / audit.record["checkpoint"]["name"]
    if not removed:
        raise ValueError("--replay: nothing was removed, so there is no safe model to compare")
    manifest = read_manifest(last)
    if missing := [domain for domain in removed if domain not in manifest["independent_of"]]:
        raise ValueError(
            f"--replay: {audit.run} is not certified for {listed(missing)}; sgtm explain {audit.run} prints the reason"
        )
    if manifest["step"] != config.train.steps:
        raise ValueError(
            f"--replay: {last.name} is not the last step of {audit.run}, {config.train.steps}, to which a replay trains"
        )
    earlier = {step_of(path): path for path in finished(audit.run)}
    first = earlier.get(manifest["step"] - steps)
    if first is None:
        before = [manifest["step"] - step for step in earlier if step < manifest["step"]]
        known = (
            f"checkpoints exist {listed([str(n) for n in before])} steps before it"
            if before
            else "none was kept before it"
        )
        raise ValueError(
            f"--replay {steps}: no checkpoint {steps} steps before {last.name}; {known} (train.checkpoint_every, "
            f"train.keep_last)"
        )
    return first, last


def _copy_of_run(scratch: Path, config: Config, first: Path, removed: Sequence[str]) -> Path:
    """A run that is to resume from the checkpoint `first`, on a corpus with other text."""
    corpus = _with_random_text(open_corpus(config, "sizes", write=False), scratch / "corpus", removed)
    data = config.data.model_copy(update={"path": str(corpus)})
    own = config.model_copy(
        update={
            "runs": str(scratch),
            "name": "again",
            "data": data,
            "wandb": config.wandb.model_copy(update={"mode": "off"}),
            "train": config.train.model_copy(update={"eval_every": 0, "checkpoint_every": 0}),
        }
    )
    run = scratch / "again"
    run.mkdir()
    save_config(own, run / "config.yaml")
    copy = checkpoints_dir(run) / first.name
    copy.mkdir(parents=True)
    for file in read_manifest(first)["files"]:
        (copy / file).symlink_to((first / file).resolve())
    manifest = read_manifest(first)
    manifest["corpus"] = sha256_of(corpus / CORPUS_MANIFEST)
    write_manifest(copy, manifest)
    return run


def _with_random_text(corpus: Corpus, out: Path, removed: Sequence[str]) -> Path:
    """The corpus with random tokens in the documents and spans of these domains, whose lengths stay; shards without any
    are links."""
    shutil.copytree(corpus.path, out, symlinks=True, copy_function=_link)
    labels = {f"forget:{domain}" for domain in removed}
    categories = [number for number, name in enumerate(corpus.categories) if corpus.categories[name] in labels]
    generator = np.random.default_rng(SEED)
    documents = np.flatnonzero(np.isin(corpus.documents["category"], categories))
    ranges: dict[int, list[tuple[int, int]]] = {}
    for number in documents:
        row = corpus.documents[number]
        ranges.setdefault(int(row["shard"]), []).append((int(row["offset"]), int(row["length"]) - 1))
    for span in corpus.spans[np.isin(corpus.spans["category"], categories)]:
        row = corpus.documents[int(span["document"])]
        start, end = int(span["start"]), int(span["end"])
        ranges.setdefault(int(row["shard"]), []).append((int(row["offset"]) + start, end - start))
    other = np.setdiff1d(np.arange(corpus.vocab_size), [corpus.eos_id])
    manifest = json.loads((corpus.path / CORPUS_MANIFEST).read_text(encoding="utf-8"))
    for shard, pieces in ranges.items():
        name = corpus.manifest.shards[shard]
        (out / name).unlink()
        shutil.copyfile(corpus.path / name, out / name)
        tokens = np.memmap(out / name, dtype=corpus.manifest.dtype, mode="r+")
        for start, length in pieces:
            tokens[start : start + length] = generator.choice(other, length)
        tokens.flush()
        manifest["files"][name]["sha256"] = sha256_of(out / name)
    (out / CORPUS_MANIFEST).unlink()
    (out / CORPUS_MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return out


def _link(source: str, target: str) -> None:
    os.symlink(os.path.realpath(source), target)


def _differences(config: Config, removed: Sequence[str], last: Path, again: Path) -> list[str]:
    """Tensors of the safe model in which the run and its replay differ."""
    conversion = Conversion(config.model, config.partition, removed)
    pairs = (conversion.tensors(weights_of(checkpoint)) for checkpoint in (last, again))
    problems = []
    for (name, one), (_, other) in zip(*pairs, strict=True):
        if count := int((one.view(torch.int32) != other.view(torch.int32)).sum()):
            problems.append(
                f"{last}: tensor {name} depends on the text of {listed(removed)}: {count:,} of {one.numel():,} "
                f"elements differ after the replay"
            )
    return problems
