"""`sgtm` and `python -m sgtm`, which is also what torchrun and the deepspeed launcher start."""

import sys


def _leave_folder_of_clone() -> None:
    """Import the installed package where Python has taken the folder of a clone for it.

    In the folder that holds a clone named sgtm, `python -m sgtm` finds that folder before an editable installation: a
    package without a file, and so without anything in it.
    """
    package = sys.modules.get("sgtm")
    if package is not None and getattr(package, "__file__", None) is None:
        del sys.modules["sgtm"], sys.path[0]


_leave_folder_of_clone()

from sgtm.commands.main import run  # noqa: E402 (after that)

if __name__ == "__main__":
    sys.exit(run())
