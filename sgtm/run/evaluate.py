"""Evaluating a finished (or stopped) run: what `summary.json` holds."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from sgtm.config import Config
from sgtm.data.evaluation import sequences_of
from sgtm.data.loader import check_corpus, isolates_documents
from sgtm.data.open import open_corpus
from sgtm.data.store import Corpus
from sgtm.data.summary import category_counts
from sgtm.distributed.env import device_type, kernel_backend
from sgtm.distributed.self_check import check_kernels
from sgtm.evaluation.localisation import gradient_norms
from sgtm.evaluation.losses import evaluate, not_finite
from sgtm.evaluation.passages import passages
from sgtm.evaluation.subject import Subject
from sgtm.files import write_atomically
from sgtm.masking.channel import most_with_group
from sgtm.model.direction import IN_RUN, Direction, direction_of, layer_of
from sgtm.model.steering import Steering
from sgtm.model.transformer import Transformer
from sgtm.run.adapted import read_adapted
from sgtm.run.adapters import adapted_domain, weights_of
from sgtm.run.checkpoint import check_same_corpus, open_run, read_manifest
from sgtm.run.located import check_data
from sgtm.run.metrics import read_metrics
from sgtm.run.unlearned import read_unlearned
from sgtm.words import listed

LIBRARIES = ("torch", "deepspeed", "transformers", "numpy")


def load_model(config: Config, checkpoint: Path, adapters: bool = True) -> Transformer:
    """The model of a checkpoint of a run in fp32, on the device that training takes, with the run's direction.

    adapters  whether those of an adapted run are merged into it; without them it is the base
    """
    with torch.device("meta"):
        model = Transformer(config.model, config.partition, kernel_backend(config.kernels, config.train.precision))
    model.load_state_dict(weights_of(checkpoint, adapters), assign=True)
    if config.steering.direction is not None:
        model.steering = Steering.of(config, direction_of_run(config, checkpoint))
    return model.to(device_type()).requires_grad_()


def direction_of_run(config: Config, checkpoint: Path) -> Direction | None:
    """The direction that a run was trained with, from its directory; None without one.

    Raises ValueError where the file is gone or another one.
    """
    file = checkpoint.parents[1] / IN_RUN
    direction = direction_of(config, file)
    if direction is not None and direction.sha256 != read_manifest(checkpoint)["direction"]:
        raise ValueError(f"{file} is another file than the run was trained with; restore it")
    return direction


def load_run_model(run: str | Path, adapters: bool = True) -> Transformer:
    """The model of a run's newest checkpoint in fp32; adapters: as `load_model` takes it.

    Raises ValueError for a folder that is no run.
    """
    return load_model(*open_run(Path(run)), adapters)


def load_bases(config: Config, checkpoint: Path) -> dict[str, Transformer]:
    """By domain, the model without its adapters; empty for a run that has none."""
    domain = adapted_domain(checkpoint)
    return {} if domain is None else {domain: load_model(config, checkpoint, adapters=False)}


def evaluate_run(
    run: str | Path,
    split: str = "test",
    sequences: int | None = None,
    data: str | None = None,
    steer: float | None = None,
    remove: Sequence[Sequence[str]] = (),
    strengths: Sequence[Mapping[str, float]] = (),
) -> dict:
    """Losses per category, full and without sets of domains (`Config.removals`), as `summary.json` holds them. Of an
    adapted run: full, and without its domain, which is the base.

    split      of the corpus to evaluate on
    sequences  at most this many sequences of each category; None: all of them
    data       `data.path` to take, of the same corpus; None: that of the run, whatever the working directory
    steer      multiple of its direction that the full model adds to every token; None: `steering.strength` of the run
    remove     sets of domains to remove besides
    strengths  models besides, each with some domains at a strength from 0 to 1

    Losses are computed in the precision of the training, gradient norms in fp32. Raises ValueError for a folder that is
    no run, a damaged checkpoint or log, another corpus than that of the run, a split that has some, but fewer than
    `sequences` of a category, `steer` for a run without direction, and `remove` or `strengths` for one without groups
    to remove or without these domains.
    """
    run = Path(run)
    config, checkpoint = open_run(run, data)
    config = with_removals(config, run, remove, strengths, adapted_domain(checkpoint))
    steered = config if steer is None else with_strength(config, run, steer)
    config = steered if steered.steered else config  # with 0 there are the same losses, nothing is added in any of them
    direction = direction_of_run(config, checkpoint)
    manifest, unlearned, adapted = read_manifest(checkpoint), read_unlearned(run), read_adapted(run)
    corpus, steps = open_run_corpus(config, run, manifest), manifest["step"]
    if sequences:
        check_sample(corpus, config, split, tuple(corpus.categories), sequences)
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "step" and line["step"] <= steps]
    seconds = max((line["seconds"] for line in lines), default=0.0)
    for precision in {"fp32", config.train.precision}:
        check_precision(config, precision)
    model, bases = load_model(config, checkpoint), load_bases(config, checkpoint)
    model.steering = Steering.of(steered, direction)
    device = next(model.parameters()).device
    norms = gradient_norms(model, corpus, config, split=split, sequences=config.train.eval_limit, device=device)
    if config.train.precision == "bf16":
        model, bases = model.bfloat16(), {domain: base.bfloat16() for domain, base in bases.items()}
    evaluation = evaluate(
        model, corpus, config, split=split, sequences=sequences, device=device, bases=bases, strengths=strengths
    )
    tokens = steps * config.train.tokens_per_step
    return {
        "name": config.name,
        "losses": evaluation.losses,
        **evaluation.sample,
        "retain_with_group": most_with_group(config.channels, config.tables),
        "counts": _counts(corpus),
        "left_out": [category for category, factor in config.data.upsample.items() if factor == 0],
        "split": split,
        "sequences": sequences,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "steps": steps,
        "of_steps": config.train.steps,
        "tokens": tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "gradient_norms": norms,
        "output_norms": evaluation.norms,
        "passages": passages(Subject(model, corpus, config, bases=bases), split),
        **({"unlearned": unlearned} if unlearned else {}),
        **({"adapted": adapted} if adapted else {}),
        **({"steering": steering_record(steered, direction)} if direction else {}),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }


def with_removals(
    config: Config,
    run: Path,
    remove: Sequence[Sequence[str]],
    strengths: Sequence[Mapping[str, float]],
    adapted: str | None = None,
) -> Config:
    """The config with sets of domains to remove besides its own.

    adapted  domain that a run has in adapters, in the place of groups
    Raises ValueError for a run without groups, an unknown domain and a strength that is not from 0 to 1.
    """
    option = "--remove" if remove else "--strength"
    if (remove or strengths) and (adapted is not None or not config.removes_groups):
        why = f"has {adapted} in adapters" if adapted is not None else "was trained without masks"
        raise ValueError(f"{option}: {run} {why}, so that no group holds a domain; leave {option} out")
    try:
        config.space.removals(remove)
    except ValueError as error:
        raise ValueError(f"--remove: {error}") from None
    for by_domain in strengths:
        try:
            config.removal_tables((), by_domain)
        except ValueError as error:
            raise ValueError(f"--strength: {error}") from None
    sets = [*config.train.eval_removed, *(list(names) for names in remove)]
    return config.model_copy(update={"train": config.train.model_copy(update={"eval_removed": sets})})


def with_strength(config: Config, run: Path, strength: float) -> Config:
    """The config with another `steering.strength`. Raises ValueError for a run without direction."""
    if config.steering.direction is None:
        raise ValueError(
            f"--steer: {run} was trained without steering.direction: there is nothing to add; leave it out"
        )
    return config.model_copy(update={"steering": config.steering.model_copy(update={"strength": strength})})


def steering_record(config: Config, direction: Direction) -> dict:
    """What the full model adds, as `summary.json` holds it."""
    return {
        "domain": direction.domain,
        "layer": layer_of(config, direction),
        "strength": config.steering.strength,
        "sha256": direction.sha256,
    }


def _counts(corpus: Corpus) -> dict[str, dict[str, dict[str, int]]]:
    """Documents and tokens by split and category; a token in a labelled span is of the span's category."""
    return {
        split: {name: {"documents": count.documents, "tokens": count.tokens} for name, count in by_category.items()}
        for split, by_category in category_counts(corpus).items()
    }


def open_run_corpus(config: Config, run: Path, manifest: dict) -> Corpus:
    """The corpus of a run. manifest: of its checkpoint.

    Raises ValueError where it is missing, does not fit the config, or is another than the run was trained on.
    """
    try:
        corpus = open_corpus(config, write=False)
    except ValueError:
        check_data(config, run)  # whose message has the remedy
        raise
    check_corpus(corpus, config)
    check_same_corpus(run, manifest, corpus.path, corpus.fingerprint)
    return corpus


def count_sequences(corpus: Corpus, config: Config, split: str, category: str, limit: int) -> int:
    """Sequences of a category, at most `limit`; 0 also where they have no target."""
    read = sequences_of(corpus, split, category, config.model.context, isolates_documents(config.data), limit)
    return len(read.numbers) if read.targets else 0


def check_sample(
    corpus: Corpus,
    config: Config,
    split: str,
    categories: Sequence[str],
    sequences: int,
    option: str = "--sequences",
    remedy: str = "leave it out to take all",
) -> None:
    """Raises ValueError where a split has fewer sequences of one of these categories than `option` wants, but some.

    remedy  how to take all
    """
    counts = {name: count_sequences(corpus, config, split, name, sequences) for name in categories}
    small = {name: count for name, count in counts.items() if 0 < count < sequences}
    if small:
        named = listed([f"{count} of {name}" for name, count in small.items()])
        raise ValueError(
            f"{option} {sequences}: split {split} of {corpus.path} has {named}; give at most {min(small.values())}, or "
            f"{remedy}"
        )


def check_held_out(corpus: Corpus, config: Config) -> None:
    """Raises ValueError where the evaluations of a training would lack losses: split test has text, but none of a
    domain, or fewer sequences of a category than `train.eval_sequences`."""
    if isinstance(config.train.eval_sequences, int):
        option = ("train.eval_sequences", "all")
        check_sample(corpus, config, "test", tuple(corpus.categories), config.train.eval_sequences, *option)
    measured = {label for name, label in corpus.categories.items() if count_sequences(corpus, config, "test", name, 1)}
    missing = [domain for domain in config.masking.domains if f"forget:{domain}" not in measured]
    if measured and missing:
        raise ValueError(
            f"split test of {corpus.path} has no text of {listed(missing)}, whose losses would be missing; prepare the "
            f"corpus again with some of it held out"
        )


def check_precision(config: Config, precision: str) -> None:
    """The self-check of the kernels in a precision, as before training; what it replaces is printed to stderr."""
    train = config.train.model_copy(update={"precision": precision})
    for warning in check_kernels(config.model_copy(update={"train": train}), lambda action: [action()]):
        print(warning, file=sys.stderr)


def write_summary(run: Path, summary: dict, name: str = "summary.json") -> None:
    """Write `summary.json`, or under another name. Raises ValueError where a loss is not finite: what was there before
    then stays.
    """
    if bad := not_finite(summary["losses"]):
        raise ValueError(
            f"{run}: not finite after step {summary['steps']}: the loss of {bad}; {run / name} is not "
            f"written. The model has diverged: skipped_steps and grad_norm in {run / 'metrics.jsonl'} show since when; "
            f"train with a lower optimizer.lr"
        )
    write_atomically(run / name, json.dumps(summary, indent=2) + "\n")
