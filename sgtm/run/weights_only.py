"""A checkpoint of weights alone: `model.safetensors`, the model's state in fp32, beside the manifest of any other.

Everything that reads weights takes it (`weights_of`, and with it evaluation, export and `load_model`); training does
not resume from it, as there are no moments and no step counts (`sgtm.run.usable`). It is put in place as DeepSpeed's
are: under a temporary name, flushed to the disk, renamed. Adapters have a file of their own in it
(sgtm/run/adapters.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from sgtm.config.schema import Config
from sgtm.distributed.storage import WEIGHTS
from sgtm.files import naming, sha256_of
from sgtm.run.adapters import ADAPTERS, DomainAdapters
from sgtm.run.checkpoint import WEIGHTS_ONLY, checkpoints_dir, resolved
from sgtm.run.saving import publish


def save_weights(
    run: Path | str,
    weights: Mapping[str, torch.Tensor],
    config: Config,
    *,
    step: int,
    corpus: str,
    adapters: DomainAdapters | None = None,
) -> Path:
    """Write the checkpoint `step_<step>` of a run and return its folder.

    weights  by name, as `Transformer.state_dict()` has them, on any device; stored in fp32
    step     steps of training that are behind the weights
    corpus   fingerprint of the data
    adapters  of a domain, which are not in the weights

    Raises OSError, naming the file, where the disk refuses it; then there is no such checkpoint.
    """
    final = checkpoints_dir(run) / f"step_{step:08d}"
    temporary = final.with_name(f".tmp-{final.name}")
    temporary.mkdir(parents=True)
    files = [_write(temporary / WEIGHTS, weights)]
    if adapters:
        files.append(_write(temporary / ADAPTERS, adapters.tensors(), adapters.metadata()))
    manifest = {
        "kind": WEIGHTS_ONLY,
        "step": step,
        "ranks": 1,
        "corpus": corpus,
        "config": resolved(config),
        "independent_of": [],  # what the weights went through is not certified
        "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files},
    }
    publish(temporary, final, manifest, keep_last=1)
    return final


def _write(file: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    stored = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    with naming(file):
        save_file(stored, file, metadata)
        file.chmod(file.parent.stat().st_mode & 0o666)  # it is written for the owner alone, unlike everything else
        with file.open("rb") as written:
            os.fsync(written.fileno())
    return file
