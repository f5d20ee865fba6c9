"""`python -m sgtm`, which is also what torchrun and the deepspeed launcher start."""

import sys

from sgtm.cli import main

sys.exit(main())
