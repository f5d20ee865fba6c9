"""What DeepSpeed writes the files of a checkpoint through.

DeepSpeed calls a collective after every rank has written, so a rank whose disk is full must not raise in between: the
writer remembers the error and the engine raises it on every rank together. Every file is hashed while it is written and
on the disk (fsync) before it counts.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine


class SafeWriter(TorchCheckpointEngine):
    """What DeepSpeed saves through.

    files  of this rank: name -> {"bytes": size, "sha256": hex digest}
    error  the first error, as an OSError that names the file, or None
    """

    def __init__(self):
        super().__init__()
        self.files: dict[str, dict] = {}
        self.error: OSError | None = None

    def makedirs(self, path, exist_ok=False):
        """The caller has made the directory."""

    def save(self, state_dict, path):
        if self.error is not None:
            return
        try:
            with open(path, "wb") as file:
                hashed = _HashedFile(file)
                torch.save(state_dict, hashed)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch wraps an error of the file in a RuntimeError
            cause = error if isinstance(error, OSError) else error.__context__ or error
            self.error = OSError(f"{Path(path).name}: {getattr(cause, 'strerror', None) or cause}")
            return
        self.files[Path(path).name] = {"bytes": hashed.bytes, "sha256": hashed.digest.hexdigest()}


class _HashedFile:
    """A file open for writing that hashes what passes through."""

    def __init__(self, file):
        self.file, self.bytes, self.digest = file, 0, hashlib.sha256()

    def write(self, data) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()
