"""README and docs hold the numbers of the committed results files, and no others."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_documents_are_current():
    command = [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
