"""Tests in this folder start no process; those that do are in tests/processes."""

import pytest
from process_starts import process_starts


@pytest.fixture(autouse=True, scope="module")
def _no_process():
    def refuse(*args, **kwargs):
        raise AssertionError("a test of tests/unit starts a process; move its file to tests/processes")

    with process_starts(refuse):
        yield
