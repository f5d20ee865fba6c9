"""The cores that a container's quota leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sgtm.process import cores
from sgtm.process.cores import cpu_quota, usable_cores


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


V1 = "5:cpu,cpuacct:/docker/1a2b\n0::/\n"
QUOTAS = {
    "version 2, the group itself": ("0::/job\n", {"job/cpu.max": "200000 100000\n"}, 2.0),
    "version 2, a group above it": (
        "0::/job/step\n",
        {"job/cpu.max": "150000 100000", "job/step/cpu.max": "max 100000"},
        1.5,
    ),
    "version 2, the least of all": ("0::/a/b\n", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "300000 100000"}, 1.0),
    "version 2, in a container that is its own root": ("0::/\n", {"cpu.max": "50000 100000"}, 0.5),
    "version 2, with the host's path": ("0::/kubepods/x\n", {"cpu.max": "400000 100000"}, 4.0),
    "version 2, none": ("0::/job\n", {"job/cpu.max": "max 100000"}, None),
    "version 1": (
        V1,
        {"cpu,cpuacct/docker/1a2b/cpu.cfs_quota_us": "250000", "cpu,cpuacct/docker/1a2b/cpu.cfs_period_us": "100000"},
        2.5,
    ),
    "version 1, in a container": (V1, {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3.0),
    "version 1, none": (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    "no control groups": ("", {}, None),
    "damaged": ("0::/job\n5\n", {"job/cpu.max": "many", "cpu.max": ""}, None),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_the_quota_of_a_container(tmp_path: Path, case: str):
    membership, files, expected = QUOTAS[case]
    write(tmp_path, {**files, "membership": membership})
    assert cpu_quota(tmp_path, tmp_path / "membership") == expected


def test_usable_cores_follow_the_quota(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    for quota, expected in ((None, 16), (2.5, 2), (0.5, 1), (64.0, 16)):
        monkeypatch.setattr(cores, "cpu_quota", lambda quota=quota: quota)
        assert usable_cores() == expected
