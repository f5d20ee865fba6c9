"""Memory and time of `sgtm export` by size of the model: it must not hold the model.

    python benchmarks/export_memory.py [--shapes 100M,1B,7B] [--dtype fp32] [--json FILE]

The checkpoint is a sparse file of zeros with the names and shapes of a Llama with a domain, the export is written to
a folder beside it (7B: 28 GB in fp32), both in --folder. Each export is a process of its own. Anonymous memory is what
the kernel cannot take back; mapped pages of the checkpoint count in the resident size alone. The exit status is 1 where
anonymous memory is more than LIMIT above the largest file of weights.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from arguments import one_of
from environment import write_rows

from sgtm.config import Config
from sgtm.config.load import load_config, save_config
from sgtm.distributed.storage import WEIGHTS
from sgtm.files import sha256_of
from sgtm.hf.export import DTYPES, export_run
from sgtm.model.transformer import Transformer
from sgtm.run.checkpoint import WEIGHTS_ONLY, checkpoints_dir, resolved, write_manifest

LIMIT = 4 * 2**10  # MiB
SHAPES = {
    "100M": {"layers": 12, "hidden_size": 768, "heads": 12, "intermediate_size": 2048},
    "1B": {"layers": 16, "hidden_size": 2048, "heads": 32, "intermediate_size": 5632},
    "7B": {"layers": 32, "hidden_size": 4096, "heads": 32, "intermediate_size": 11008},
}
POLL = 0.01  # seconds


def config_of(shape: str) -> Config:
    sizes = {
        "family": "llama",
        "window": "null",
        "vocab_size": 32000,
        "context": 4096,
        "tie_embeddings": False,
        **SHAPES[shape],
    }
    options = [f"--model.{key}={value}" for key, value in sizes.items()]
    return load_config(
        "debug",
        [*options, "--masking.domains=[bio]", "--masking.percent=5", "--name=big", "--train.tokens_per_step=4096"],
    )


def write_run(folder: Path, shape: str) -> Path:
    """A run directory whose checkpoint holds zeros, as a file that takes no room."""
    config = config_of(shape)
    with torch.device("meta"):
        state = Transformer(config.model, config.partition, "torch").state_dict()
    header, end = {}, 0
    for name, tensor in state.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    run = folder / "big"
    checkpoint = checkpoints_dir(run) / "step_00000001"
    checkpoint.mkdir(parents=True)
    save_config(config, run / "config.yaml")
    with (checkpoint / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    entry = {"bytes": (checkpoint / WEIGHTS).stat().st_size, "sha256": sha256_of(checkpoint / WEIGHTS)}
    manifest = {"kind": WEIGHTS_ONLY, "step": 1, "ranks": 1, "corpus": "", "config": resolved(config)}
    write_manifest(checkpoint, {**manifest, "independent_of": [], "files": {WEIGHTS: entry}})
    return run


def measured(shape: str, dtype: str, folder: Path) -> dict:
    """Peak MiB of the process that exports the run without its domain, and how long it takes."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        run, out = write_run(Path(scratch), shape), Path(scratch) / "out"
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, __file__, "--export", str(run), str(out), dtype])
        before, peaks = None, {"RssAnon": 0.0, "VmHWM": 0.0}
        while process.poll() is None:
            for name, value in memory_of(process.pid).items():
                peaks[name] = max(peaks[name], value)
            if before is None and (out.parent / "imported").exists():
                before = memory_of(process.pid).get("RssAnon")
            time.sleep(POLL)
        if process.returncode:
            raise SystemExit(f"the export of {shape} has failed")
        seconds = time.perf_counter() - began
        files = [file.stat().st_size for file in out.glob("*.safetensors")]
        parameters = sum(file.stat().st_size for file in checkpoints_dir(run).rglob(WEIGHTS)) // 4
    sizes = {"shape": shape, "dtype": dtype, "parameters": parameters, "files": len(files)}
    memory = {"imports_mib": before, "anonymous_mib": peaks["RssAnon"], "resident_mib": peaks["VmHWM"]}
    return {**sizes, **memory, "largest_file_mib": max(files) / 2**20, "seconds": seconds}


def memory_of(process: int) -> dict[str, float]:
    """MiB of /proc/PID/status; empty when the process has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    values = dict(line.split(":", 1) for line in lines if line.startswith(("RssAnon", "VmHWM")))
    return {name: int(value.split()[0]) / 1024 for name, value in values.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=one_of(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="with room for the export")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--export", nargs=3, metavar=("RUN", "OUT", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.export:
        run, out, dtype = args.export
        (Path(out).parent / "imported").touch()
        export_run(run, ["bio"], out, dtype=dtype)
        return 0
    rows = []
    for shape in args.shapes:
        rows.append(measured(shape, args.dtype, args.folder))
        print(json.dumps(rows[-1]))
    if args.json:
        write_rows(args.json, rows)
    return int(any(row["anonymous_mib"] > row["largest_file_mib"] + LIMIT for row in rows))


if __name__ == "__main__":
    sys.exit(main())
