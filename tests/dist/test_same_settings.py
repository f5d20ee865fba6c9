"""Ranks that were started with different settings are an error that names one, before anything is trained.

Paths may differ: of what they name the content is compared.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_ranks

from sgtm.config import load_config

OTHER = {
    "--optimizer.lr=0.25": r"rank 1 on .* has optimizer.lr 0.25, but rank 0 on .* has 0.00\d+; start every node",
    "--masking.strategy=none": "rank 1 on .* has masking.strategy none, but rank 0 on .* has sgtm",
    "--name=other": "rank 1 on .* has name other, but rank 0",
    "--train.eval_every=1": "rank 1 on .* has train.eval_every 1, but rank 0",
    "--resume": "rank 1 on .* has --resume True, but rank 0 on .* has False",
}


def start(folder: str) -> None:
    from safetensors.torch import load_file, save_file

    from sgtm.hf.export import export_run
    from sgtm.training.loop import train

    for word, expected in OTHER.items():
        other = dist.get_rank() == 1
        options = [word] if other and word != "--resume" else []
        config = load_config("debug", [f"--runs={folder}/runs", "--train.steps=2", *options])
        with pytest.raises(ValueError, match=expected):
            train(config, resume=other and word == "--resume")
    assert not Path(folder, "runs").exists()
    config = load_config("debug", [f"--runs={folder}/./runs", "--train.steps=1", "--optimizer.warmup_steps=0"])
    run = train(config)  # with the same settings, and a path that may be written in another way
    exports = Path(folder, "a"), Path(folder, "b")
    if dist.get_rank() == 0:
        export_run(run, [], exports[0])
        shutil.copytree(*exports)
        weights = load_file(exports[1] / "model.safetensors")
        next(iter(weights.values())).view(-1)[0] += 1
        save_file(weights, exports[1] / "model.safetensors", {"format": "pt"})
    dist.barrier()
    corpus = f"--data.path={folder}/runs/synthetic-512"
    for name, start in (("alike", exports[0]), ("unlike", exports[dist.get_rank()])):
        options = [f"--name={name}", "--train.steps=1", "--optimizer.warmup_steps=0", f"--train.init_from={start}"]
        config = load_config("debug", [f"--runs={folder}/runs", corpus, *options])
        if name == "alike":
            train(config)
            continue
        with pytest.raises(ValueError, match=r"rank 1 on .* has checksum of train.init_from \d+, but"):
            train(config)


def test_different_settings_are_an_error(tmp_path):
    run_ranks(start, 2, str(tmp_path))
    assert (tmp_path / "runs" / "debug" / "metrics.jsonl").exists()
