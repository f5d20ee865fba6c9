"""`sgtm` and `python -m sgtm`, which is also what torchrun and the deepspeed launcher start."""

import sys

from sgtm.cli import main
from sgtm.cores import wait_passively_where_busy


def run() -> int:
    """The command line as a process of its own, which may end here: see `end_rank`."""
    status = 1
    wait_passively_where_busy()
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
