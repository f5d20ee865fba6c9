"""The log of a run on a disk that is full.

Faults tried, each seen to fail: the file not named; the error of closing it raised in place of the first.
"""

from __future__ import annotations

import pytest
from tiny import tiny_config

from sgtm.train.metrics import MetricsLog, read_metrics

LINE = {"step": 1, "seconds": 1.0, "loss": 2.0, "tokens_per_second": 3.0}


def test_a_full_disk_is_said_with_the_file(tmp_path):
    log = MetricsLog(tmp_path, tiny_config(), rank=0, start=0)
    log.open()
    with pytest.raises(OSError) as full, log:
        log.step(LINE)
        log.file.close()
        log.file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
        log.step({**LINE, "step": 2})
    assert str(full.value).startswith(f"{tmp_path / 'metrics.jsonl'} could not be written: No space left on device;")
    assert "Go on with --resume" in str(full.value)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]
