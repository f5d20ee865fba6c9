"""`sgtm` that waits in its N-th step until a signal has come, so that a test's signal is never late.

python tests/e2e/paused.py N train debug ...
"""

import sys
import time

from sgtm.commands.main import run
from sgtm.training import loop


class Paused(loop.StopSignal):
    """Counts the steps of this process, as the loop asks once in each."""

    left = int(sys.argv.pop(1))

    def anywhere(self, engine) -> bool:
        Paused.left -= 1
        while Paused.left == 0 and not self.received:
            time.sleep(0.01)
        return super().anywhere(engine)


loop.StopSignal = Paused
sys.exit(run())
