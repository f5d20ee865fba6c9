"""What a masked training step costs: against the same step unmasked, and that against plain PyTorch, compiled.

    python benchmarks/steps.py [--shape 124m,254m,llama-1b] [--backend runs,triton] [--json FILE]

Forward, backward and AdamW on one device, at the shapes and with the masks of the presets (model_shapes.py), on random
tokens. In every round each step takes its turn, so that ratios are of times of the same round. A row is one share of
forget tokens in one mixing mode and backend (step_cases.py); where a share comes about over steps only, it is the mean
of two others and says so:

    milliseconds        of a step, p20/p50/p80 like all that follow
    ratio               to strategy `none` on the same batches, cut into the same micro-batches and documents
    ratio_public        time for a token, to the plain model's
    flops_utilisation   model FLOPs of an unmasked step, 6 N + 12 L H Q T for each token (Chowdhery et al., "PaLM",
                        2022, appendix B; N with the head, without what is only looked up; T the context, or the window
                        of a local layer), over time and the rate of a big matmul timed in the same rounds. Work that a
                        mask or the borders of documents save counts as done.
    datasheet_utilisation   the same over the rate in the device's data sheet, where it is known
    peak_mib            weights, moments and what a step takes at most on top of them

Needs torch, numpy, PyYAML (transformers brings it), `sgtm` and `sgtm_kernels` in the path, and no package besides.
"""

from __future__ import annotations

import argparse
import gc
import sys
from functools import partial

import numpy as np
import torch
from arguments import FAST, add_measuring, one_of
from environment import percentiles, write_rows
from model_shapes import SETTINGS, Setting
from ops import works
from roofline import MATMUL, Roofline
from step_cases import NONE, Case, Mean, Ours, PlainSteps, cases, random_batches, tables_of

from sgtm_kernels.dispatch import unusable
from sgtm_kernels.measurement import peak_growth
from sgtm_kernels.timing import Clock

PLAIN = "plain PyTorch"
SHAPES = ("124m", "254m", "llama-1b")
TINY = "tiny"
RATIOS = {0: 1.00, 5: 1.00, 25: 0.96, 100: 0.80}  # targets, at most: of the time, by percent of forget tokens
SPEEDS = {"124m": 460_000, "254m": 290_000, "llama-1b": 50_000}  # and at least: unmasked tokens/s on one H100
# Dense bf16 TFLOP/s, by the name that CUDA gives: half of what the data sheets of H100 and H200 give with sparsity, and
# NVIDIA's A100 data sheet.
DATASHEET = {
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H200": 989.4,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
}


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
    on, dtype = args.device, {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    shapes = args.shape or (SHAPES if on.type == "cuda" else (TINY,))
    if not args.shape and on.type != "cuda":
        print(f"--shape {TINY}, because this is a CPU: {', '.join(SHAPES)} are for a GPU", flush=True)
    clock, roofline, rows = Clock(on), Roofline(on, dtype), []
    for name in shapes:
        torch.manual_seed(0)
        steps = Steps(SETTINGS[name](), on, dtype, backends)
        measured = steps.measure(clock, roofline, args.rounds, args.seconds)
        head = {"shape": name, "dtype": args.dtype, "target_tokens_per_second": SPEEDS.get(name)}
        rows += [head | row for row in measured]
        show(f"{name}, {args.dtype}", measured)
        del steps
        if on.type == "cuda":  # the compiled model is in a cycle
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()
    if args.json:
        write_rows(args.json, rows)
    return 0


class Steps:
    """Both models on one device, and every step that is timed, by (backend, name of the case)."""

    def __init__(self, setting: Setting, device: torch.device, dtype: torch.dtype, backends: list[str]):
        self.setting, self.device = setting, device
        self.cases = cases(setting)
        self.ours, self.plain = Ours(setting, device, dtype), PlainSteps(setting, device, dtype)
        batches = {
            name: random_batches(setting, case.batches, device)
            for name, case in self.cases.items()
            if isinstance(case, Case)
        }
        self.tokens = {name: batch[0].step_targets for name, batch in batches.items()}
        public = {PLAIN: partial(self.plain.step, batches[NONE])}
        self.public = {name: way for name, way in public.items() if works(name, way)}
        self.models = [self.ours, *([self.plain] if self.public else [])]
        self.ways = {
            (backend, name): partial(self.ours.step, backend, tables_of(setting, self.cases[name].strategy), batch)
            for backend in backends
            for name, batch in batches.items()
        }
        model = self.ours.mixed.model
        looked_up = [model.position, model.embedding if model.head is not None else None]
        parameters = sum(p.numel() for p in model.parameters())
        self.flops = setting.model.flops_per_token(parameters - sum(p.numel() for p in looked_up if p is not None))

    def measure(self, clock: Clock, roofline: Roofline, rounds: int, seconds: float) -> list[dict]:
        """One row for the plain model, then one for each case in each backend."""
        matmul = {MATMUL: roofline.ways[MATMUL]}
        times = clock.rounds({**self.public, **self.ways, **matmul}, rounds, seconds)
        times = {key: np.array(found) for key, found in times.items()}
        growth = {key: peak_growth(way) for key, way in (self.public | self.ways).items()}
        for model in self.models:
            if not torch.isfinite(model.loss):
                raise RuntimeError(f"loss {model.loss.item()} of {type(model).__name__}: these steps do not train")
        rate = roofline.flops / times[MATMUL]

        def row(name: str, backend: str, case: Case | Mean, weights: dict, own: Ours | PlainSteps) -> dict:
            """`weights`: the measured steps that this row is the mean of."""
            taken = sum(weight * times[key] for key, weight in weights.items())
            tokens = sum(weight * self.tokens[_name(key)] for key, weight in weights.items())
            peak = own.bytes() / 2**20 + max(growth[key] for key in weights)
            speed = tokens / taken
            found = {
                "row": name,
                "backend": backend,
                "percent": case.percent,
                "mixing": list(case.mixing),
                "mean_of": {_name(key): weight for key, weight in weights.items()} if len(weights) > 1 else None,
                "tokens": round(tokens),
                "milliseconds": percentiles(1e3 * taken),
                "tokens_per_second": round(float(np.median(speed)), 1),
                "flops_utilisation": percentiles(self.flops * speed / rate),
                "matmul_tflops": percentiles(rate / 1e12),
                "peak_mib": round(peak, 1),
                "rounds": len(taken),
            }
            if PLAIN in self.public:
                found["ratio_public"] = percentiles(self.tokens[NONE] / times[PLAIN] / speed)
            if self.device.type == "cuda" and (listed := DATASHEET.get(torch.cuda.get_device_name())):
                found["datasheet_utilisation"] = percentiles(self.flops * speed / listed / 1e12)
            if own is self.ours:
                base = backend, case.of
                found["of"] = case.of
                found["ratio"] = percentiles(taken / times[base])
                found["memory_ratio"] = round(peak / (own.bytes() / 2**20 + growth[base]), 4)
                masked = isinstance(case, Mean) or case.strategy != NONE
                found["target"] = RATIOS[case.percent] if masked else None
            return found

        rows = [row(name, "public", self.cases[NONE], {name: 1.0}, self.plain) for name in self.public]
        for backend in dict.fromkeys(backend for backend, _ in self.ways):
            for name, case in self.cases.items():
                parts = case.weights if isinstance(case, Mean) else {name: 1.0}
                rows.append(row(name, backend, case, {(backend, part): w for part, w in parts.items()}, self.ours))
        return rows


def _name(key: str | tuple[str, str]) -> str:
    """Of the case that a timed step takes; the plain model takes that of `none`."""
    return key[1] if isinstance(key, tuple) else NONE


def show(title: str, rows: list[dict]) -> None:
    print(
        f"\n{title}: {rows[0]['rounds']} rounds; matmul {rows[0]['matmul_tflops']['p50']:.4g} TFLOP/s; ratios p20 / "
        f"p50 / p80, to `none` on the same batches; plain: time for a token to {PLAIN}'s; * mean of other steps"
    )
    print(
        f"{'backend':8} {'row':22} {'tokens/s':>10} {'ratio':22} {'target':6} {'plain':>6} {'MFU':>6} {'MiB':>8} memory"
    )
    for r in rows:
        spread = " / ".join(f"{v:.3f}" for v in r.get("ratio", {}).values())
        target = f"{r['target']:.2f}" if r.get("target") else ""
        plain = f"{r['ratio_public']['p50']:.3f}" if "ratio_public" in r else ""
        memory = f"{r['memory_ratio']:.3f}" if "memory_ratio" in r else ""
        print(
            f"{r['backend']:8} {r['row'] + ' *' * bool(r['mean_of']):22} {r['tokens_per_second']:10,.0f} {spread:22} "
            f"{target:6} {plain:>6} {r['flops_utilisation']['p50']:6.1%} {r['peak_mib']:8.0f} {memory}"
        )


if __name__ == "__main__":
    sys.exit(main())
