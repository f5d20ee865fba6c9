"""The file of a direction: the difference of mean activations on a domain's text and on retain text.

One tensor, `direction`, fp32 [layers, hidden_size]: of the residual stream after each block. The metadata have one key,
`direction`, whose JSON records how it was measured (sgtm/unlearning/mean_difference.py): `run`, `checkpoint`, `step`
and `manifest_sha256` of that checkpoint; `domain`; `layer`, the block that is taken unless `steering.layer` says
another; and by set, `forget` and `retain`: `categories`, `tokens`, `norms` (mean L2 norm of the residual stream after
each block) and `projections` (of the set's mean on the unit direction, after each block).

Nothing here imports torch: a mistake is printed before anything heavy is imported.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sgtm.config.schema import Config
from sgtm.files import replacing, sha256_of

KEY = "direction"
IN_RUN = "direction.safetensors"
"""Name of the copy in a run directory."""


@dataclass(frozen=True)
class Direction:
    """
    vectors  fp32 [layers, hidden_size]
    record   how they were measured
    sha256   of the file
    """

    vectors: np.ndarray
    record: dict
    sha256: str

    @property
    def domain(self) -> str:
        return self.record["domain"]


def write_direction(path: Path, vectors: np.ndarray, record: dict) -> None:
    """Write the file whole; the same vectors and record give the same bytes. Raises OSError naming it."""
    content = save({KEY: np.ascontiguousarray(vectors, np.float32)}, {KEY: json.dumps(record)})
    with replacing(path) as file:
        file.write(content)


def read_direction(path: Path | str) -> Direction:
    """Raises ValueError where the file is missing, damaged, or none of `sgtm direction`."""
    path = Path(path)
    try:
        content, digest = path.read_bytes(), sha256_of(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; write it with: sgtm direction RUN --out {path}") from None
    try:
        vectors, record = load(content)[KEY], json.loads(_metadata(content)[KEY])
        if not (isinstance(record["domain"], str) and isinstance(record["layer"], int)):
            raise ValueError("domain and layer in its metadata are no name and number")
    except (SafetensorError, ValueError, KeyError, TypeError, struct.error) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged, or no file of sgtm direction ({problem}); write it again") from None
    if vectors.dtype != np.float32 or vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ValueError(f"{path} is damaged: its direction is not a finite fp32 [layers, hidden_size]; write it again")
    return Direction(vectors, record, digest)


def direction_of(config: Config, path: Path | str | None = None) -> Direction | None:
    """The direction of a run, None without one; path: to read in place of `steering.direction`.

    Raises ValueError where the file is missing or damaged, or does not fit the model or its domains.
    """
    if config.steering.direction is None:
        return None
    path = config.steering.direction if path is None else path
    try:
        direction = read_direction(path)
    except ValueError as error:
        raise ValueError(f"steering.direction: {error}") from None
    shape, expected = direction.vectors.shape, (config.model.layers, config.model.hidden_size)
    if shape != expected:
        raise ValueError(
            f"steering.direction: {path} is of {shape[0]} layers and hidden size {shape[1]}, but model.layers is "
            f"{expected[0]} and model.hidden_size {expected[1]}; measure it on a run of the same model"
        )
    if direction.domain not in config.space.domains:
        raise ValueError(
            f"steering.direction: {path} is of the domain {direction.domain!r}, but masking.domains has "
            f"{', '.join(config.space.domains) or 'none'}"
        )
    layer = layer_of(config, direction)
    if not 0 <= layer < expected[0]:
        raise ValueError(f"steering.direction: {path} is damaged: its layer is {layer}; write it again")
    if not direction.vectors[layer].any():
        raise ValueError(f"steering.direction: {path} is 0 after block {layer}; take another steering.layer")
    return direction


def layer_of(config: Config, direction: Direction) -> int:
    """The block after which it is added."""
    return direction.record["layer"] if config.steering.layer is None else config.steering.layer


def keep_direction(config: Config, run: Path) -> None:
    """Copy the file into the run directory, so that the run is evaluated wherever it is moved."""
    if config.steering.direction is not None:
        content = Path(config.steering.direction).read_bytes()
        with replacing(run / IN_RUN) as file:
            file.write(content)


def _metadata(content: bytes) -> dict:
    """Of a safetensors file: eight bytes of length, then a header in JSON."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])["__metadata__"]
