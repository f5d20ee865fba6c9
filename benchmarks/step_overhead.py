"""What masking costs: step times against the unmasked step of the same code, and against Hugging Face's GPT-Neo.

    python benchmarks/step_overhead.py [--preset tinystories-18m] [--sequences 4] [--rounds 15] [--json FILE]

The rows of `sgtm bench` (sgtm/bench.py) on one micro-batch, and in the same rounds those of Hugging Face, which runs in
processes of its own (hugging_face.py): their `ratio` is our unmasked tokens/s over theirs. The project's target stands
beside what was measured.
"""

from __future__ import annotations

import torch
from environment import write_rows
from hugging_face import Peer
from one_micro_batch import asked

from sgtm.bench import Way, masked_steps, measure, print_rows, setting
from sgtm.config import Config

FOREIGN = "Hugging Face eager"
# Of the ratio. A pure forget step with joint parameters free has 91 % of the unmasked matmul work at the 18M shape.
TARGETS = {
    "nothing masked": "<= 1.02",
    "25 % forget sequences": "<= 1.00",
    "pure forget": "<= 0.85",
    "pure forget, joint masked": "<= 0.85",
    "Hugging Face eager, bf16 autocast": ">= 3",
}


def main() -> None:
    args, config = asked(__doc__.splitlines()[0], rounds=15)
    rows = [with_target(row, config) for row in measure(masked_steps(config) | peers(config), config, args.rounds)]
    print_rows(rows)
    if args.json:
        write_rows(args.json, rows)


def peers(config: Config) -> dict[str, Way]:
    ways = {}
    for precision in ("bf16 autocast", "bf16 weights"):
        ways[f"{FOREIGN}, {precision}"] = Peer(config, precision)
        if not torch.cuda.is_available():
            ways[f"{FOREIGN}, {precision}, freed memory kept"] = Peer(config, precision, "kept")
    return ways


def with_target(row: dict, config: Config) -> dict:
    foreign = {"ratio_of": "our unmasked tokens/s, to its"} if row["row"].startswith(FOREIGN) else {}
    return row | foreign | {"target": TARGETS.get(row["row"]), "setting": setting(config)}


if __name__ == "__main__":
    main()
