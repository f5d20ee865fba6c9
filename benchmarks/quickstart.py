"""What `make quickstart` shows, as a results file.

    make quickstart && python benchmarks/quickstart.py --json FILE

Takes the losses, training time and throughput from `runs/quickstart/summary.json`; nothing is trained here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from environment import write_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--json", type=Path, required=True, help="write one JSON object")
    args = parser.parse_args()
    write_rows(args.json, [{"run": args.run.name, **json.loads((args.run / "summary.json").read_text())}])


if __name__ == "__main__":
    main()
