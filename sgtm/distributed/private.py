"""Private names of DeepSpeed that are set here: each only where it is, so that another version fails at once."""

from __future__ import annotations

import deepspeed


def replace(owner: object, name: str, value: object) -> None:
    """Set a private name of DeepSpeed. Raises RuntimeError where it is not there: setting it would change nothing."""
    if name not in (owner if isinstance(owner, dict) else dir(owner)):
        where = "__compatible_ops__" if isinstance(owner, dict) else getattr(owner, "__name__", type(owner).__name__)
        raise RuntimeError(f"deepspeed {deepspeed.__version__} has no {name} in {where}; SGTM needs 0.19 (setup.py)")
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)
