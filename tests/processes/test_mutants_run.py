"""The runner of `make mutants`, on a repository of one function: what it counts, prints and exits with."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SOURCE = "def double(x):\n    return 2 * x\n"
TEST = "import source\n\n\ndef test_double():\n    assert source.double(0) == {expected}\n"
SAME = "at 0 it is the same"
FAULTS = """
- {{fault: an odd number, file: source.py, old: "return 2 * x", new: "return 2 * x + 1", test: test_source.py}}
- {{fault: a crash, file: source.py, old: "return 2 * x", new: "import os; os.abort()", test: test_source.py}}
- {{fault: a triple, file: source.py, old: "return 2 * x", new: "return 3 * x", test: test_source.py{survives}}}
"""


@pytest.mark.parametrize(
    ("survives", "expected", "status", "end"),
    [
        ("", 0, 1, "3 faults, 1 survive\n  source.py: a triple\n    NOT EXPLAINED: test_source.py\n"),
        (
            ", survives: at 0 it is the same",
            0,
            0,
            "3 faults, 1 survive\n  source.py: a triple\n    at 0 it is the same\n",
        ),
        ("", 1, 1, "error: tests fail on the code as it is\n"),
    ],
)
def test_a_survivor_is_an_error_unless_it_is_explained(tmp_path, survives, expected, status, end):
    (tmp_path / "tests" / "mutations").mkdir(parents=True)
    (tmp_path / "tests" / "mutations" / "all.yaml").write_text(FAULTS.format(survives=survives))
    (tmp_path / "source.py").write_text(SOURCE)
    (tmp_path / "test_source.py").write_text(TEST.format(expected=expected))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    code = (
        "import sys, types, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "sys.modules['transformers'] = types.ModuleType('transformers')\n"
        "import mutants; mutants.ROOT = pathlib.Path(sys.argv[2]); sys.exit(mutants.main(['--jobs', '2']))"
    )
    done = subprocess.run([sys.executable, "-c", code, TESTS, tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout[-len(end) :]) == (status, end), done.stdout + done.stderr
    if not expected:
        assert [done.stdout.count(word) for word in ("killed ", "crashed ", "(SIGABRT)")] == [1, 1, 1]
        assert (tmp_path / "source.py").read_text() == SOURCE, "faults are made in copies"
