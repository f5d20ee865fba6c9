"""Types of the scripts' arguments: what is wrong is said, with what would be right, before anything runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection

import torch


def one_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Names with commas between them, each of `known`."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return parse


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def device(text: str) -> torch.device:
    """A device of torch; of CUDA only where there is one."""
    try:
        found = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"no device {text!r}; cpu or cuda") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("there is no CUDA device here; cpu is what there is")
    return found
