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

from sgtm.cli import main  # noqa: E402 (after that)


def run() -> int:
    """The command line as a process of its own, which may end here: see `end_rank`."""
    status = 1
    try:
        status = main()
    except Exception:
        sys.excepthook(*sys.exc_info())  # the interpreter may not come to it
    finally:
        if "sgtm.distributed.process_group" in sys.modules:  # else no group was joined, and torch may not be loaded
            from sgtm.distributed.process_group import end_rank

            end_rank(status)
    return status


if __name__ == "__main__":
    sys.exit(run())
