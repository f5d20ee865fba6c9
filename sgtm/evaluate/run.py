"""Evaluating a finished (or stopped) run: `summary.json`."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from sgtm.config import Config, load_config
from sgtm.data.store import Corpus, write_atomically
from sgtm.data.synthetic import open_corpus
from sgtm.distributed.storage import consolidate
from sgtm.evaluate.localisation import gradient_norms
from sgtm.evaluate.losses import category_losses
from sgtm.model.transformer import Transformer
from sgtm.report.record import read_record
from sgtm.train.checkpoint import find_latest
from sgtm_kernels.dispatch import resolve

LIBRARIES = ("torch", "deepspeed", "transformers", "numpy")


def load_run(run: Path) -> tuple[Config, Transformer]:
    """Config and model of the newest checkpoint of a run directory, in the precision it was trained in.

    Raises ValueError for a folder that is no run or has no checkpoint.
    """
    config_file = run / "config.yaml"
    if not config_file.exists():
        raise ValueError(
            f"{run} is not a run directory: it has no config.yaml; `sgtm train` makes one at <runs>/<name>"
        )
    config = load_config(str(config_file), [])
    latest = find_latest(run)
    if latest is None:
        raise ValueError(f"{run} has no checkpoint yet; train first")
    with torch.device("meta"):
        model = Transformer(config.model, config.partition, resolve(config.kernels.backend))
    model.load_state_dict(consolidate(latest), assign=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    return config, model.to(device, dtype).requires_grad_()


def evaluate_run(run: Path, split: str = "test", sequences: int | None = None) -> dict:
    """Losses per category, full and without each subset of domains; writes and returns `summary.json`.

    split      of the corpus to evaluate on
    sequences  at most this many sequences of each category; None: all of them
    """
    config, model = load_run(run)
    corpus: Corpus = open_corpus(config)
    device = next(model.parameters()).device
    losses = category_losses(model, corpus, config, split=split, sequences=sequences, device=device)
    norms = gradient_norms(model, corpus, config, split=split, sequences=config.train.eval_sequences, device=device)
    steps = read_record(run).steps
    last = steps[-1] if steps else {"seconds": 0.0, "tokens": 0, "step": 0}
    summary = {
        "name": config.name,
        "losses": losses,
        "true_labels": dict(corpus.categories),
        "split": split,
        "seconds": round(last["seconds"], 3),
        "tokens_per_second": round(last["tokens"] / last["seconds"], 1) if last["seconds"] else None,
        "steps": last["step"],
        "tokens": last["tokens"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "gradient_norms": norms,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }
    write_atomically(run / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary
