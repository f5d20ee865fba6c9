"""An offline wandb run, read back through wandb's own messages, holds what metrics.jsonl holds."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from sgtm.config import load_config
from sgtm.distributed.testing import run_ranks

OVERRIDES = ["--train.steps=4", "--train.eval_every=2", "--wandb.mode=offline", "--wandb.project=offline-test"]


def train_offline(runs: str) -> str:
    from sgtm.train.loop import train

    return str(train(load_config("debug", [*OVERRIDES, f"--runs={runs}"])))


def read_history(run: Path) -> list[dict]:
    """Rows of the run's history, from the records that `wandb sync` would upload."""
    from wandb.proto import wandb_internal_pb2

    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    rows = []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def records(data: bytes) -> Iterator[bytes]:
    """Records of a wandb file: a header of 7 bytes, then LevelDB's log format (blocks of 32 KiB, records in pieces)."""
    assert data[:4] == b":W&B"
    full, first, _middle, last = 1, 2, 3, 4
    at, pieces = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # too short for another piece's head
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        pieces = data[at + 7 : at + 7 + length] if kind in (full, first) else pieces + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (full, last):
            yield pieces


def test_offline_run(tmp_path: Path):
    run = Path(run_ranks(train_offline, 1, str(tmp_path), timeout=200, env={"WANDB_MODE": "offline"})[0])
    logged: dict[int, dict] = {}
    for row in read_history(run):
        logged.setdefault(row["_step"], {}).update(row)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"step", "eval"}
    for line in lines:
        row = logged[line["step"]]
        if line["kind"] == "step":
            assert row["loss"] == pytest.approx(line["loss"])
            assert row["lr"] == pytest.approx(line["lr"])
        else:
            for removed, by_category in line["losses"].items():
                for category, value in by_category.items():
                    assert row[f"eval/{removed}/{category}"] == pytest.approx(value)
