"""The record of how a run was made from another, as `sgtm unlearn` and `sgtm adapt` leave one: a JSON file beside its
config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from sgtm.files import write_atomically


def write_record(file: Path, record: dict) -> None:
    write_atomically(file, json.dumps(record, indent=1) + "\n")


def read_record(file: Path, described: Callable[[dict], str], remedy: str) -> dict | None:
    """None for a run without one. Raises ValueError, with the remedy, for a file that `described` cannot describe."""
    try:
        record = json.loads(file.read_text("utf-8"))
        described(record)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); {remedy}") from None
    return record
