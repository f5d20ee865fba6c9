"""The faults of tests/mutations can still be made; `make mutants` makes them."""

import signal

import pytest
import yaml
from mutants import FAILED, PASSED, ROOT, Job, Mutant, load, run

MUTANTS = load()


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_every_fault_fits_the_code(file):
    text = (ROOT / file).read_text("utf-8")
    for mutant in MUTANTS:
        if mutant.file == file:
            broken = mutant.applied(text)
            if file.endswith(".py"):
                compile(broken, file, "exec")


def test_the_tests_named_exist():
    for mutant in MUTANTS:
        for test in mutant.tests:
            file, _, function = test.partition("::")
            assert f"def {function.partition('[')[0]}" in (ROOT / file).read_text("utf-8"), test


def test_every_file_is_of_one_folder_of_the_source():
    for path in sorted((ROOT / "tests" / "mutations").glob("*.yaml")):
        for entry in yaml.safe_load(path.read_text("utf-8")):
            parts = entry["file"].split("/")
            of_room = parts[0] == "sgtm" and len(parts) > 2
            expected = ["kernels", *parts[2:-1]] if parts[0] == "kernels" else [parts[1] if of_room else parts[0]]
            assert path.stem == "_".join(expected), f"{entry['fault']}: {entry['file']}"


def test_faults_have_names_of_their_own():
    names = [(mutant.file, mutant.fault) for mutant in MUTANTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("b = 1", "b = 2", "a = 1\n    b = 2\n"),
        ("a = 1\n    b = 1\n", "c = 1\n", "c = 1\n"),
        (" = 1", " = 2", None),  # no whole line
        ("a = 1", "a = 1", None),
        ("d = 1", "d = 2", None),
    ],
)
def test_whole_lines_at_any_indentation(old, new, expected):
    mutant = Mutant("fault", "file", old, new, "test")
    text = "a = 1\n    b = 1\n"
    if expected is None:
        with pytest.raises(ValueError, match="fault: "):
            mutant.applied(text)
    else:
        assert mutant.applied(text) == expected


class Scripted:
    """A tree whose tests end with these wait statuses: a signal's number, or 256 times an exit status."""

    def __init__(self, folder, *statuses: int):
        self.folder, self.statuses, self.calls = folder, list(statuses), []

    def make(self, mutant: Mutant) -> None:
        self.calls.append("make")

    def start(self, tests: list[str]) -> int:
        return 7

    def wait(self) -> tuple[int, int]:
        return 7, self.statuses.pop(0)

    def mend(self) -> None:
        self.calls.append("mend")


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ((0,), PASSED),
        ((256,), FAILED),
        ((signal.SIGSEGV, signal.SIGSEGV), -signal.SIGSEGV),
        ((signal.SIGKILL, 0), PASSED),  # the machine was out of memory, perhaps
        ((signal.SIGKILL, 256), FAILED),
    ],
)
def test_a_crash_counts_if_it_happens_twice(tmp_path, monkeypatch, statuses, expected):
    tree = Scripted(tmp_path, *statuses)
    monkeypatch.setattr("mutants.os.wait", tree.wait)
    monkeypatch.setattr("mutants.os.killpg", lambda group, number: None)
    ((index, status, _, output),) = run([Job(["a test"], Mutant("fault", "file", "a", "b", "a test"))], [tree])
    assert (index, status, output) == (0, expected, "")
    assert tree.calls == ["make", "mend"] * len(statuses) and not tree.statuses
