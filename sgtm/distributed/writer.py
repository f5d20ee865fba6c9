"""What DeepSpeed writes the files of a checkpoint through, while training continues.

DeepSpeed hands over a state at a time. It is copied to host memory there and then, and written by a thread: training
waits for the copy alone. The copies' memory is kept for the next checkpoint, so that a rank never holds more than one
copy of its state beside the state itself. Every file is hashed while it is written and on the disk (fsync) before it
counts. Its pages are given back as it goes: a checkpoint would push the corpus, which is mapped, out of the page cache,
and where pages are scarce finding new ones takes longer than writing.

DeepSpeed calls a collective after every rank has saved, so a rank whose disk is full must not raise in between: the
writer remembers the error, and `Engine.saved` raises it on every rank together.
"""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from sgtm.files import HashedFile


class BackgroundWriter(TorchCheckpointEngine):
    """What DeepSpeed saves through: any number of `save`, then `begin`, and later `end`."""

    def __init__(self):
        super().__init__()
        self._copies = Copies()
        self._states: list[tuple[Any, Path]] = []
        self._thread: threading.Thread | None = None
        self._files: dict[str, dict] = {}
        self._error: OSError | None = None

    def makedirs(self, path, exist_ok=False):
        """The caller has made the directory."""

    def save(self, state_dict, path):
        self._states.append((self._copies.take(state_dict), Path(path)))

    def begin(self) -> None:
        """Start to write what has been saved."""
        self._thread = threading.Thread(target=self._write, name="sgtm-checkpoint")
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def end(self) -> dict[str, dict]:
        """Wait for the files of this rank: name -> {"bytes": size, "sha256": hex digest}.

        Raises the first error as an OSError that names the file; then and afterwards another checkpoint can be saved.
        """
        if self._thread is not None:
            self._thread.join()
        files, error = self._files, self._error
        self._states, self._thread, self._files, self._error = [], None, {}, None
        self._copies.give_back()
        if error is not None:
            raise error
        return files

    def _write(self) -> None:
        for state, path in self._states:
            try:
                with open(path, "wb") as file:
                    hashed = HashedFile(file)
                    torch.save(state, hashed)  # type: ignore[arg-type]  # it writes and flushes, no more
                    hashed.sync()
            except Exception as error:  # torch wraps an error of the file in a RuntimeError
                cause = error if isinstance(error, OSError) else error.__context__ or error
                self._error = OSError(f"{path.name}: {getattr(cause, 'strerror', None) or cause}")
                return
            self._files[path.name] = {"bytes": hashed.bytes, "sha256": hashed.digest.hexdigest()}


class Copies:
    """Copies of states in host memory, which is pinned where there is a GPU and used again from copy to copy."""

    def __init__(self):
        self._buffers: list[torch.Tensor] = []
        self._used = 0

    def take(self, value: Any) -> Any:
        """The same value, with no tensor and no container in common with it."""
        if isinstance(value, torch.Tensor):
            buffer = self._buffer(value.shape, value.dtype)
            buffer.copy_(value.detach())
            return buffer
        if isinstance(value, dict):
            taken = copy.copy(value)  # a subclass stays what it is
            for key, item in value.items():
                taken[key] = self.take(item)
            return taken
        if type(value) in (list, tuple):
            return type(value)(self.take(item) for item in value)
        return copy.deepcopy(value)

    def give_back(self) -> None:
        """What has been taken is no longer needed."""
        self._used = 0

    def _buffer(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        number, self._used = self._used, self._used + 1
        if number == len(self._buffers):
            self._buffers.append(torch.empty(0))
        buffer = self._buffers[number]
        if buffer.shape != shape or buffer.dtype != dtype:
            buffer = torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())
            self._buffers[number] = buffer
        return buffer
