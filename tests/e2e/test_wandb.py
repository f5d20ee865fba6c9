"""An offline wandb run, read back through wandb's own messages, holds what metrics.jsonl holds, also when resumed."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from ranks import run_ranks
from same_run import wait_for_step
from waiting import PATIENCE, wait_until

from sgtm.config import load_config
from sgtm.process.signals import Stopped
from sgtm.run.metrics import read_metrics

# As `python -m sgtm`, with as long as its server needs on a busy machine, and 3 seconds for one that has died.
PATIENT = f"""from sgtm.run import metrics; metrics.WANDB_START, metrics.WANDB_FINISH = {PATIENCE:.0f}, 3
from sgtm.commands.main import run; exit(run())"""
OVERRIDES = ["--train.steps=4", "--train.eval_every=2", "--wandb.mode=offline", "--wandb.project=offline-test"]


def train_offline(runs: str) -> str:
    """A run, ended by a signal after its second step and resumed."""
    from sgtm.training import loop

    config, inner = load_config("debug", [*OVERRIDES, f"--runs={runs}"]), loop.train_step

    def stopped(engine, *args):
        inner(engine, *args)
        if engine.optimizer.steps["final_norm"] == 2:
            signal.raise_signal(signal.SIGTERM)

    loop.train_step = stopped
    with suppress(Stopped):
        loop.train(config)
    loop.train_step = inner
    return str(loop.train(config, resume=True))


def read_segments(run: Path) -> list[tuple[str, list[dict]]]:
    """Id and rows of the history of every start of the run, from the records that `wandb sync` would upload."""
    from wandb.proto import wandb_internal_pb2

    segments = []
    for file in sorted(run.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        ids, rows = [], []
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.append(record.run.run_id)
            elif record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
        assert len(set(ids)) == 1
        segments.append((ids[0], rows))
    return segments


def records(data: bytes) -> Iterator[bytes]:
    """Records of a wandb file: a header of 7 bytes, then LevelDB's log format (blocks of 32 KiB, records in pieces)."""
    assert data[:4] == b":W&B"
    full, first, _middle, last = 1, 2, 3, 4
    offset, pieces = 7, b""
    while offset + 7 <= len(data):
        left = 32768 - offset % 32768
        if left < 7:  # too short for another piece's head
            offset += left
            continue
        length, kind = struct.unpack_from("<HB", data, offset + 4)
        piece = data[offset + 7 : offset + 7 + length]
        pieces = piece if kind in (full, first) else pieces + piece
        offset += 7 + length
        if kind in (full, last):
            yield pieces


def test_offline_run(tmp_path: Path):
    run = Path(run_ranks(train_offline, 1, str(tmp_path), env={"WANDB_MODE": "offline"})[0])
    segments = read_segments(run)
    assert [sorted({row["_step"] for row in rows}) for _, rows in segments] == [[1, 2], [2, 3, 4]]
    assert {run_id for run_id, _ in segments} == {json.loads((run / "wandb.id").read_text())["id"]}
    logged: dict[int, dict] = {}
    for row in (row for _, rows in segments for row in rows):
        logged.setdefault(row["_step"], {}).update(row)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] != "checkpoint"]  # not in wandb: they come out of order
    assert {line["kind"] for line in lines} == {"step", "eval"}
    for line in lines:
        row = logged[line["step"]]
        if line["kind"] == "step":
            assert row["loss"] == pytest.approx(line["loss"])
            assert row["lr"] == pytest.approx(line["lr"])
            for label, parts in line["norms"].items():
                assert row[f"residual/{label}"] == pytest.approx(parts["residual"][-1])
        else:
            for removed, by_category in line["losses"].items():
                for category, value in by_category.items():
                    assert row[f"eval/{removed}/{category}"] == pytest.approx(value)


def test_online_without_a_login_is_one_message(tmp_path: Path):
    """Not a question at the terminal, for which the other ranks would wait; no run directory is left."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-m", "sgtm", "train", "debug", f"--runs={tmp_path}", "--wandb.mode=online"],
        env={**environ, "HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "wandb.mode online: " in done.stderr and "wandb login" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["synthetic-512"]


def test_a_server_that_does_not_answer_is_one_warning(tmp_path: Path):
    """Logged in, but nobody listens: the run is an offline one, to be synced later, and trains as any other."""
    code = "from sgtm.run import metrics; metrics.WANDB_START = 3; from sgtm.commands.main import run; exit(run())"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "debug", f"--runs={tmp_path}", "--wandb.mode=online", "--train.steps=2"],
        env={**environ, "HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40},
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("warning: wandb's server does not answer") == 1 and "Traceback" not in done.stderr
    (rows,) = [rows for _, rows in read_segments(tmp_path / "debug") if rows]
    assert {row["_step"] for row in rows} == {1, 2}


REFUSED = {
    "--wandb.mode=offline --wandb.project=my/project": "wandb refuses the run (project 'my/project', entity None): ",
    "--wandb.mode=online --wandb.entity=no-such-team": "wandb's server refuses the run (",
    "WANDB_BASE_URL=localhost:8080 --wandb.mode=online": "WANDB_BASE_URL: found 'localhost:8080': ",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_wandb_refuses_is_an_error_before_training(tmp_path: Path, words: str):
    port_file = tmp_path / "port"
    server = subprocess.Popen([sys.executable, Path(__file__).with_name("wandb_server.py"), port_file, "403"])
    try:
        wait_until(lambda: port_file.exists() and port_file.read_text() != "", server)
        environ = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
        environ |= {"HOME": str(tmp_path), "WANDB_API_KEY": "0" * 40}
        environ |= {"WANDB_BASE_URL": f"http://127.0.0.1:{port_file.read_text()}"}
        options = [word for word in words.split() if word.startswith("--")]
        environ |= dict(word.split("=") for word in words.split() if not word.startswith("--"))
        done = subprocess.run(
            [sys.executable, "-c", PATIENT, "train", "debug", f"--runs={tmp_path}", *options],
            env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
    finally:
        server.kill()
        server.wait()
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"error: {REFUSED[words]}" in done.stderr, done.stderr
    assert not (tmp_path / "debug").exists()


@pytest.mark.parametrize("dies", ["wandb's server", "wandb's own process"])
def test_what_dies_in_the_middle_does_not_stop_the_training(tmp_path: Path, dies: str):
    port_file, runs, steps = tmp_path / "port", tmp_path / "runs", 150
    server = subprocess.Popen([sys.executable, Path(__file__).with_name("wandb_server.py"), port_file])
    environ = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    command = [sys.executable, "-c", PATIENT, "train", "debug", f"--runs={runs}", f"--train.steps={steps}"]
    try:
        wait_until(lambda: port_file.exists() and port_file.read_text() != "", server)
        url = f"http://127.0.0.1:{port_file.read_text()}"
        process = subprocess.Popen(
            [*command, "--wandb.mode=online"],
            env={**environ, "HOME": str(tmp_path), "WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        wait_for_step(runs / "debug", 5)
        rank = psutil.Process(process.pid)
        rank.suspend()
        core = [child for child in rank.children(recursive=True) if "wandb-core" in child.name()]
        assert core and len(read_metrics(runs / "debug" / "metrics.jsonl")) < steps
        if dies == "wandb's server":
            server.kill()
        else:
            core[0].kill()
        rank.resume()
        printed, _ = process.communicate(timeout=PATIENCE)
    finally:
        server.kill()
        server.wait()
    assert process.returncode == 0 and "Traceback" not in printed, printed
    assert "does not answer" not in printed, "it answered in the beginning"
    assert printed.count("warning: wandb has stopped") == (dies == "wandb's own process"), printed
    assert [line["step"] for line in read_metrics(runs / "debug" / "metrics.jsonl") if "loss" in line] == [
        *range(1, steps + 1)
    ]
