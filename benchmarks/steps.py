"""What a masked training step costs: against the same step unmasked, and that against plain PyTorch, compiled on a GPU.

    python benchmarks/steps.py [--shape 124m,254m,llama-1b] [--backend torch,triton] [--json FILE]

Forward, backward and AdamW on one device, at the shapes and with the masks of the presets (sgtm/measure/models.py), on
random tokens. In every round each step takes its turn, so that ratios are of times of the same round. A row is one
share of forget tokens in one mixing mode and backend (sgtm/measure/cases.py); where no single step has that share, the
row is the mean of two others, marked with `mean_of`. Besides what every row has (sgtm/measure/rows.py):

    of                  `none` on the same batches, cut into the same micro-batches and documents; for that, and for the
                        plain model, `none` on whole sequences
    flops_utilisation   model FLOPs of an unmasked step, 6 N + 12 L H Q T for each token (Chowdhery et al., "PaLM",
                        2022, appendix B; N with the head, without what is only looked up; T the context, or the window
                        of a local layer), over time and the rate of a big matmul timed in the same rounds. Work that a
                        mask or the borders of documents save counts as done.
    datasheet_utilisation   the same over the rate in the device's data sheet, where it is known
    peak_mib            weights, moments and what a step takes at most on top of them

Rows are appended to FILE, and flushed to disk, at the end of each group of steps (sgtm/measure/mixings.py): a run that
is killed keeps what it has measured. A step that fails (memory, a kernel) becomes a row with an `error`, and the rest
is measured; the exit status is 1 if nothing was. Needs only torch, numpy, `sgtm` and `sgtm_kernels`.
"""

from __future__ import annotations

import argparse
import sys

import torch
from arguments import FAST, add_measuring, one_of
from environment import RESULTS

sys.path.insert(0, str(RESULTS.parents[1]))

from sgtm.measure.mixings import MixingSweep
from sgtm.measure.models import SETTINGS
from sgtm.measure.rounds import described, release_memory
from sgtm.measure.rows import RowFile, failure, table
from sgtm_kernels.dispatch import unusable

SHAPES = ("124m", "254m", "llama-1b")
TINY = "tiny"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = f"(default: {','.join(SHAPES)} on a GPU, {TINY} on a CPU)"
    parser.add_argument("--shape", type=one_of(SETTINGS), help=f"of {','.join(SETTINGS)} {defaults}")
    add_measuring(parser, "shape", rounds=10, seconds=40)
    args = parser.parse_args()
    for backend in args.backend or ():
        if problem := unusable(backend):
            parser.error(f"--backend {backend}: {problem}")
    backends = args.backend or [backend for backend in FAST if not unusable(backend)]
    shapes = args.shape or (SHAPES if args.device.type == "cuda" else (TINY,))
    if not args.shape and args.device.type != "cuda":
        print(f"--shape {TINY}, because this is a CPU: {', '.join(SHAPES)} are for a GPU", flush=True)
    file, measured = RowFile(args.json), 0
    for name in shapes:
        for rows in measure(name, backends, args):
            rows = [{"shape": name, "dtype": args.dtype, **row} for row in rows]
            file.write(rows)
            measured += sum("error" not in row for row in rows)
            print(f"\n{name}, {args.dtype}\n{table(rows)}", flush=True)
        release_memory()
    return int(not measured)


def measure(name: str, backends: list[str], args: argparse.Namespace):
    """The rows of a shape, a group at a time; a single row with the error if the model cannot be built."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    torch.manual_seed(0)
    try:
        yield from MixingSweep(name, SETTINGS[name](), args.device, dtype, backends).rows(args.rounds, args.seconds)
    except Exception as error:
        yield [failure("all", described(error))]


if __name__ == "__main__":
    sys.exit(main())
