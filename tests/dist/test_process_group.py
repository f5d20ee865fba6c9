"""How `end_rank` of sgtm/distributed/process_group.py ends a rank.

What `atexit` has to do is done, and the interpreter is not torn down under gloo's threads.
"""

import atexit
from pathlib import Path

import torch.distributed as dist
from ranks import run_ranks


class Witness:
    """Touches a file when the interpreter takes its module apart."""

    def __init__(self, path: Path):
        self.path = path

    def __del__(self, open=open):
        open(self.path, "w").close()


def leave_witnesses(folder: str) -> None:
    rank = dist.get_rank()
    globals()["witness"] = Witness(Path(folder, f"teardown{rank}"))
    atexit.register(Path(folder, f"exit{rank}").touch)


def test_a_rank_ends_before_the_interpreter_does(tmp_path):
    run_ranks(leave_witnesses, 2, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exit0", "exit1"]
