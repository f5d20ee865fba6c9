"""Ranks of a test: results in their order, output where one fails, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from waiting import wait_until

HERE = str(Path(__file__).parent)
CLIENT = """
import sys
sys.path[:0] = sys.argv[1:3]
from test_ranks import sleep
from ranks import run_ranks
run_ranks(sleep, 2, sys.argv[3])
"""


def rank_and_sum(value: int) -> tuple:
    total = torch.tensor(value + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), int(total), os.environ.get("OF_THIS_LAUNCH"), os.getpid()


def sleep(folder: str) -> None:
    Path(folder, f"pid{dist.get_rank()}").write_text(str(os.getpid()))
    time.sleep(1000)


def fail_on_rank_1(folder: str) -> None:
    if dist.get_rank() == 1:
        while not pids(Path(folder)):
            time.sleep(0.01)
        raise ValueError("of rank 1")
    sleep(folder)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pids(folder: Path) -> list[int]:
    return [int(file.read_text()) for file in folder.glob("pid*") if file.read_text()]


def test_results_come_in_the_order_of_ranks():
    first = run_ranks(rank_and_sum, 3, 10, env={"OF_THIS_LAUNCH": "yes"})
    assert [result[:3] for result in first] == [(rank, 33, "yes") for rank in range(3)]
    second = run_ranks(rank_and_sum, 2, 0)
    assert [result[:3] for result in second] == [(rank, 1, None) for rank in range(2)]
    assert len({pid for *_, pid in first + second} | {os.getpid()}) == 6


def test_one_that_fails_ends_all(tmp_path):
    with pytest.raises(AssertionError, match=r"rank 1 ended with status 1[\s\S]*ValueError: of rank 1"):
        run_ranks(fail_on_rank_1, 2, str(tmp_path))
    assert not any(map(is_running, pids(tmp_path)))


def test_the_time_is_up(tmp_path):
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] still ran after 0\.1 s"):
        run_ranks(sleep, 2, str(tmp_path), timeout=0.1)
    assert not any(map(is_running, pids(tmp_path)))


def test_an_interruption_ends_all_and_the_next_launch_works(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    watcher = subprocess.Popen(
        [sys.executable, "-c", f"import os, pathlib, time\nfolder = pathlib.Path({str(tmp_path)!r})\n"
         f"while len(list(folder.glob('pid*'))) < 2: time.sleep(0.01)\nos.kill({os.getpid()}, {int(signal.SIGALRM)})"]
    )  # fmt: skip
    try:
        with pytest.raises(KeyboardInterrupt):
            run_ranks(sleep, 2, str(tmp_path))
    finally:
        signal.signal(signal.SIGALRM, previous)
        watcher.wait()
    assert len(pids(tmp_path)) == 2 and not any(map(is_running, pids(tmp_path)))
    assert run_ranks(rank_and_sum, 1, 7)[0][1] == 7


def test_a_client_that_is_killed_leaves_no_process(tmp_path):
    client = subprocess.Popen([sys.executable, "-c", CLIENT, HERE, f"{HERE}/..", str(tmp_path)])
    wait_until(lambda: len(pids(tmp_path)) == 2)
    client.kill()
    client.wait()
    wait_until(lambda: not any(map(is_running, pids(tmp_path))))
