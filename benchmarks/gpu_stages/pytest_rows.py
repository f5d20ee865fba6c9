"""A plugin of pytest that appends a row for every test file once all of its tests have run.

    pytest -p pytest_rows --rows FILE ...

A row has the file, the op that it is of (where it is of one), how many tests passed, failed and were skipped, and the
first failed ones by name. A failed test gets a row of its own at once, with its message. With xdist the process that
hands out the tests writes the rows.

A test that leaves the GPU unusable ends its worker: that test counts as failed, and those after it run in a new one.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from journal import FAILED, OK, Journal

MESSAGE, NAMED = 300, 20


def pytest_addoption(parser):
    parser.addoption("--rows", help="file that rows are appended to")


def pytest_configure(config):
    config.pluginmanager.register(Worker(), "rows-worker")
    if config.getoption("--rows") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(RowsPlugin(Journal(Path(config.getoption("--rows")))), "rows")


def op_of(file: str, ops: tuple[str, ...]) -> str | None:
    """The op that a test file is of: that with the longest name which test_<op>*.py begins with."""
    name = Path(file).stem.removeprefix("test_")
    return max((op for op in ops if name == op or name.startswith(f"{op}_")), key=len, default=None)


class RowsPlugin:
    """Counts of every file, in the process that collects the results."""

    def __init__(self, journal: Journal):
        from sgtm_kernels.dispatch import OPS

        self.journal, self.ops = journal, OPS
        self.written: set[str] = set()
        self.expected: Counter[str] = Counter()
        self.seen: dict[str, dict[str, str]] = {}
        self.seconds: Counter[str] = Counter()
        self.problems: dict[str, list[str]] = {}

    def pytest_collection_finish(self, session):
        """Without xdist."""
        self._expect(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        """With xdist: every worker has collected the same."""
        if not self.expected:
            self._expect(ids)

    def _expect(self, ids):
        self.expected.update(_file(i) for i in ids)

    def pytest_collectreport(self, report):
        if report.failed:
            name, error = Path(report.nodeid.split("::")[0]).name, str(report.longrepr)[-MESSAGE:]
            self.journal.add({"item": name, "op": op_of(name, self.ops), "outcome": FAILED, "error": error})

    def pytest_runtest_logreport(self, report):
        file = _file(report.nodeid)
        tests = self.seen.setdefault(file, {})
        self.seconds[file] += report.duration
        if report.failed:
            self._failed(file, report)
            tests[report.nodeid] = "failed"
        elif report.skipped:
            tests[report.nodeid] = "skipped"
        elif report.when == "call":
            tests.setdefault(report.nodeid, "passed")
        # A worker that crashed reports no teardown of the test that it was running.
        if (report.when == "teardown" or report.when == "???") and len(tests) == self.expected[file]:
            self._write(file)

    def _failed(self, file: str, report) -> None:
        message = str(report.longrepr)[-MESSAGE:]
        self.problems.setdefault(file, []).append(report.nodeid.split("::", 1)[1])
        self.journal.add({"test": report.nodeid.split("::", 1)[1], "file": file, "error": message})

    def _write(self, file: str) -> None:
        if file in self.written:
            return
        self.written.add(file)
        counts = Counter(self.seen[file].values())
        row = {"item": file, "op": op_of(file, self.ops), "seconds": round(self.seconds[file], 1)}
        row |= {name: counts[name] for name in ("passed", "failed", "skipped")}
        row["outcome"] = FAILED if counts["failed"] else OK
        if counts["failed"]:
            row |= {"failed_tests": self.problems[file][:NAMED], "error": f"{counts['failed']} tests failed"}
        self.journal.add(row)


class Worker:
    """In every process that runs tests."""

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        yield
        if call.excinfo is not None and hasattr(item.config, "workerinput") and not _gpu_answers():
            os._exit(70)


def _gpu_answers() -> bool:
    torch = sys.modules.get("torch")
    try:
        if torch and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _file(nodeid: str) -> str:
    return Path(nodeid.split("::")[0]).name
