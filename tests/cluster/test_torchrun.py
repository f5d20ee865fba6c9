"""launch/torchrun.sh on two hosts, and one of them cut off from the other in the middle of the run.

`test_one_host_is_cut_off` fails if DeepSpeed's groups keep their own timeout (no rank ends within 200 s), and if
torchrun.sh has no watch over torchrun, or one that takes dead ranks for living (torchrun is still there 85 s after the
cut).
"""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest
from cluster.hosts import NODES, Hosts, Process
from cluster.runs import assert_same_run, finish_with_torchrun, suspended, torchrun, wait_for_step

LIMIT, OUTLIVE = 15, 10  # seconds: of a collective, and how long torchrun may outlive its ranks


def test_one_host_is_cut_off(hosts: Hosts, uninterrupted: Path, tmp_path: Path):
    """Both end by themselves, and say why; plugged in again, the run goes on to the same losses."""
    limit = f"--distributed.timeout_minutes={LIMIT / 60}"
    sides = torchrun(hosts, tmp_path, "cut", limit, WAIT=str(OUTLIVE))
    wait_for_step(tmp_path / "cut", 8)
    hosts.link("node-1", "down")
    try:
        began = time.monotonic()
        for side in sides:
            assert side.wait(LIMIT + OUTLIVE + 60 - (time.monotonic() - began)) != 0
            assert re.search(
                r"Timed out waiting|the run hangs|does not answer|connection to the C10d store has failed", side.output
            ), side.output
    finally:
        hosts.link("node-1", "up")
    assert "resumed after step" in finish_with_torchrun(hosts, tmp_path, "cut", "--resume")
    assert_same_run(tmp_path / "cut", uninterrupted)


@pytest.mark.parametrize("node", NODES)
def test_a_signal_on_one_host_ends_the_run_on_both(hosts: Hosts, uninterrupted: Path, tmp_path: Path, node: str):
    sides: dict[str, Process] = dict(zip(NODES, torchrun(hosts, tmp_path, "signalled", WAIT=str(OUTLIVE)), strict=True))
    with suspended(hosts, tmp_path / "signalled", 8):
        sides[node].send_signal(signal.SIGUSR1)
    for side in sides.values():
        side.wait(60)
    assert "checkpoint saved" in sides["node-0"].output + sides["node-1"].output
    assert "resumed after step" in finish_with_torchrun(hosts, tmp_path, "signalled", "--resume")
    assert_same_run(tmp_path / "signalled", uninterrupted)
