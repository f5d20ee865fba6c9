"""A rank that dies or hangs ends the run in seconds, with what happened to it said first and once.

Real processes under torchrun, and by hand, where rank 0 holds the store.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from waiting import PATIENCE, wait_until

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("lost_ranks.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]


def broken(how: str, rank: int = 1) -> list[str]:
    """Lines of the output of three ranks, one of which breaks, without torchrun's own words."""
    command = [*TORCHRUN, str(SCRIPT), how, str(rank)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == (0 if how == "finish" else 1), done.stdout
    output = re.split(r"^E\d{4} .* failed \(", done.stdout, maxsplit=1, flags=re.MULTILINE)[0]
    return [line for line in output.splitlines() if not re.match(r"W\d{4} ", line)]


@pytest.mark.parametrize(
    ("how", "first", "known"),
    [
        ("refuse", "error: rank 1: the disk of this rank is full", "ended with exit status 2"),
        # torchrun may have reaped it before a neighbour looks.
        ("kill", None, r"(killed by SIGKILL|ended with an unknown exit status) \(pid \d+ on \S+\)"),
    ],
)
def test_others_print_in_one_line_whom_they_lost(how, first, known):
    lines = broken(how)
    if first:
        assert lines.pop(0) == first
    assert len(lines) == 2, lines
    for rank in (0, 2):
        assert any(re.fullmatch(f"error: rank {rank}: lost rank 1: {known}", line) for line in lines), lines


@pytest.mark.parametrize(
    ("how", "first", "known"),
    [
        ("raise", "Traceback (most recent call last):", "RuntimeError: a bug of this rank"),
        ("crash", "Fatal Python error: Segmentation fault", "killed by SIGSEGV"),
    ],
)
def test_the_stack_of_the_broken_rank_comes_first_and_is_the_only_one(how, first, known):
    lines = broken(how)
    assert lines[0].removeprefix("[rank1]: ") == first, lines
    for rank in (0, 2):
        assert re.search(
            f"error: rank {rank}: lost rank 1: ({known}|ended with an unknown exit status)", "\n".join(lines[-2:])
        ), lines
    assert "\n".join(lines).count(first) == 1


def stacks(lines: list[str]) -> dict[str, str]:
    """What each rank has said, and the rest."""
    text = "\n".join(lines)
    parts = re.split(r"^error: rank (\d): the run hangs", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


@pytest.mark.parametrize("how", ["stop", "hold"])
def test_a_rank_that_gives_no_sign_of_life_is_diagnosed(how):
    outputs = stacks(broken(how))
    assert sorted(outputs) == ["", "0", "2"]
    for rank, other in (("0", "2"), ("2", "0")):
        output = outputs[rank]
        assert re.search(r"rank 1: last heard of in step \d+, \w+; no sign of life \(pid \d+ on ", output), outputs
        assert f"rank {other}: step 40, backward\n" in output
        assert "minutes in step 40, backward (distributed.timeout_minutes 0.05)" in output
        assert "dist.all_reduce(torch.ones(1))" in output
    last = max(outputs.values(), key=lambda text: "Fatal Python error: Aborted" in text)
    assert ("in hold_the_interpreter" if how == "hold" else "in train") in last.partition("Fatal")[2], "its own stack"


def test_a_rank_that_goes_elsewhere_prints_where():
    outputs = stacks(broken("sleep"))
    assert sorted(outputs) == ["", "0", "1", "2"] and "Fatal" not in outputs["1"]
    assert "minutes in step 40, forward" in outputs["1"] and "time.sleep(600)" in outputs["1"]
    assert "ranks 0, 2: step 40, backward\n" in outputs["1"]
    assert "rank 1: step 40, forward\n" in outputs["0"]


def test_ranks_that_end_well_print_nothing():
    assert broken("finish") == []


def by_hand(*arguments: str, **environment: str) -> list[subprocess.Popen]:
    """Two ranks without a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            env={**os.environ, **address, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


EXITED = r"ended with exit status 3 \(pid \d+ on \S+\)"


@pytest.mark.parametrize(
    ("others", "environment", "known"),
    [
        ((), {}, EXITED),
        (("sleep",), {}, EXITED),  # no collective fails there
        (("sleep",), {"STEP": "1"}, EXITED),  # before its first beat
        (("sleep",), {"APART": "1"}, "the store of the run does not answer"),  # nor is its process to be seen
    ],
    ids=str,
)
def test_rank_0_takes_the_store_with_it(others, environment, known):
    ranks = by_hand("exit", "0", *others, **environment)
    output, _ = ranks[1].communicate(timeout=PATIENCE)
    assert ranks[1].returncode == 1
    lines = [line for line in output.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "Traceback" not in output, output
    assert re.match(f"error: rank 1: lost (rank 0|another rank): {known}", lines[0]), output
    assert ranks[0].communicate(timeout=PATIENCE) and ranks[0].returncode == 3


def test_a_job_that_was_suspended_resumes_when_it_is_woken():
    """For longer than the limit: both ranks stop themselves in step 40."""
    ranks = by_hand("suspend", "1", "suspend")
    try:
        wait_until(lambda: {psutil.Process(rank.pid).status() for rank in ranks} == {psutil.STATUS_STOPPED})
        time.sleep(7)
        for rank in ranks:
            rank.send_signal(signal.SIGCONT)
        output = "".join(rank.communicate(timeout=PATIENCE)[0] for rank in ranks)
        assert [rank.returncode for rank in ranks] == [0, 0], output
        assert "error:" not in output and "hangs" not in output
    finally:
        for rank in ranks:
            rank.kill()
