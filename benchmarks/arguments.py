"""Argument types of the scripts. An invalid value ends them before anything runs, with the valid ones.

torch is imported where it is used: gpu.py, which starts the processes that need it, does without.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FAST = ("torch", "triton")  # backends that are worth timing


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
    import torch

    try:
        torch_device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"no device {text!r}; cpu or cuda") from None
    if torch_device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("there is no CUDA device here; cpu is what there is")
    return torch_device


def add_measuring(parser: argparse.ArgumentParser, of: str, rounds: int, seconds: float) -> None:
    """Options that ops.py and steps.py share: backends, rounds, device, dtype, results file. of: what is measured."""
    import torch

    parser.add_argument("--backend", type=one_of(FAST), help=f"{','.join(FAST)} (default: those that run here)")
    parser.add_argument("--rounds", type=positive, default=rounds, help=f"of each {of} (default {rounds})")
    text = f"fewer rounds of each {of} where this is over (default {seconds:g})"
    parser.add_argument("--seconds", type=float, default=seconds, help=text)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--json", type=Path, help="write one JSON object per row")
