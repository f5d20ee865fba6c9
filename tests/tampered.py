"""Runs to attack: a tiny corpus, and a random model in the place of a checkpoint's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from corpora import config_for
from random_models import moved_model

from sgtm.data.store import Corpus
from sgtm.run import opened
from sgtm.run.opened import OpenedRun


def tampered(
    monkeypatch: pytest.MonkeyPatch, run: Path, corpus: Corpus, group: int | None = None, name: str = "w", **sections
) -> OpenedRun:
    """group: seed of what the domain's group holds; name: of the weights; sections: as `config_for` takes them."""
    config = config_for(optimizer={"lr": 1e-2}, **sections)
    run.mkdir(exist_ok=True)

    def load(config, checkpoint, adapters=True):
        model = moved_model(config, 0.1)
        if group is not None:
            torch.manual_seed(group)
            with torch.no_grad():
                for block in model.blocks:
                    block.mlp.w_out[block.mlp.bounds[1] :].normal_()
        return model

    monkeypatch.setattr(opened, "load_model", load)
    monkeypatch.setattr(opened, "check_precision", lambda *rest: None)
    return OpenedRun(run, config, Path("step_00000001"), corpus, name)
