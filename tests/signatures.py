"""Stand-ins for functions that take what the functions themselves take, and nothing else."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable


def as_called(real: Callable, stand_in: Callable) -> Callable:
    """`stand_in`, which raises TypeError for arguments that `real` does not take."""
    signature = inspect.signature(real)

    @functools.wraps(real)
    def checked(*args, **options):
        signature.bind(*args, **options)
        return stand_in(*args, **options)

    return checked
