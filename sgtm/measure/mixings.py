"""The steps of every mixing mode of one model in a bare loop, and that of the plain model, as rows.

Steps are measured in groups, and each group's rows are yielded when it is done: whole sequences first, then the plain
model, documents, and micro-batches of one label. Each group includes the unmasked step of the first backend, to which
all rows are relative. The plain model exists only during its own group: a large one would not fit beside ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from sgtm.data.batch import Batch
from sgtm.measure.bare import Ours, PlainSteps
from sgtm.measure.cases import NONE, Case, Mean, cases, random_batches
from sgtm.measure.models import Setting
from sgtm.measure.rounds import LocalStep, Rounds, Sample, described, release_memory, take_rounds
from sgtm.measure.rows import GPU_TARGETS, SPEED_TARGETS, Parent, as_parent, failure, row
from sgtm_kernels.measurement import percentiles

PLAIN, MATMUL = "plain PyTorch", "matmul"
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
Key = tuple[str, str]  # backend, name of the case
Step = Key | str  # of ours; `PLAIN` or `MATMUL`


class MixingSweep:
    """Our model on one device, and every step of it that is timed."""

    def __init__(self, name: str, setting: Setting, device: torch.device, dtype: torch.dtype, backends: list[str]):
        self.setting, self.device, self.dtype, self.backends = setting, device, dtype, backends
        self.cases = cases(setting)
        self.taken = {name: case for name, case in self.cases.items() if isinstance(case, Case)}  # others are means
        self.ours = Ours(setting, device, dtype)
        self.root: Key = (backends[0], NONE)
        self.anchor: Parent | None = None  # `root`, once it has a row
        self.targets, self.speed = (GPU_TARGETS, SPEED_TARGETS.get(name)) if device.type == "cuda" else ({}, None)
        self.matmul, self.matmul_flops = _matmul(device, dtype)
        model = self.ours.mixed.model
        looked_up = [model.position, model.embedding if model.head is not None else None]
        parameters = sum(p.numel() for p in model.parameters())
        self.flops = setting.model.flops_per_token(parameters - sum(p.numel() for p in looked_up if p is not None))

    def rows(self, rounds: int, seconds: float) -> Iterator[list[dict]]:
        """The rows of a group at a time. `seconds` are for all groups together; a step that fails has a row as well."""
        bases = dict.fromkeys(case.of for case in self.cases.values())
        share = seconds / (len(bases) + 1)
        for base in bases:
            names = [name for name, case in self.cases.items() if case.of == base]
            yield self._of_one_base(names, rounds, share)
            if base == NONE:
                yield [self._plain(rounds, share)]

    def _batches(self, case: Case, device: torch.device) -> list[Batch]:
        return random_batches(case.batches, self.setting.model, device)

    def _tokens(self, name: str) -> int:
        return sum(sum(pieces.lengths) for pieces in self.taken[name].batches)

    def _steps(self, keys: list[Key]) -> dict[Step, LocalStep]:
        steps: dict[Step, LocalStep] = {}
        for backend, name in keys:
            case = self.taken[name]
            batches = self._batches(case, torch.device("cpu"))  # each step copies them, as in training
            steps[backend, name] = LocalStep(partial(self.ours.step, backend, case.tables, batches))
        return steps

    def _take(self, steps: dict[Step, LocalStep], rounds: int, seconds: float) -> Rounds[Step]:
        steps = steps | {MATMUL: LocalStep(self.matmul)}
        return take_rounds(steps, rounds, seconds, may_fail=list(steps), warm_up=2)

    def _of_one_base(self, names: list[str], rounds: int, seconds: float) -> list[dict]:
        keys = [(backend, name) for backend in self.backends for name in names if name in self.taken]
        took = self._take(self._steps(list(dict.fromkeys([self.root, *keys]))), rounds, seconds)
        _must_train(took, self.ours, [key for key in took.took if key != MATMUL])
        rows = []
        for backend in self.backends:
            parents: dict[str, Parent] = {}
            if anchor := self._anchor_of(took):
                parents[NONE] = anchor
            for name in names:
                rows.append(self._row(backend, name, took, parents))
        return rows

    def _anchor_of(self, took: Rounds[Step]) -> Parent | None:
        """The unmasked step of the first backend, in these rounds; None where it failed or has no row yet."""
        if self.anchor is None or self.root in took.failed:
            return None
        sample = took.sample(self.root, self._tokens(NONE))
        return Parent(NONE, sample, self.anchor.tokens_per_second, self.anchor.peak)

    def _row(self, backend: str, name: str, took: Rounds[Step], parents: dict[str, Parent]) -> dict[str, Any]:
        case, about = self.cases[name], {"backend": backend, "percent": self.cases[name].percent}
        about |= {"mixing": list(case.mixing), "mean_of": case.weights if isinstance(case, Mean) else None}
        parts = case.weights if isinstance(case, Mean) else {name: 1.0}
        if wrong := [took.failed[backend, part] for part in parts if (backend, part) in took.failed]:
            return failure(name, wrong[0]) | about
        sample = Sample.mean(list(parts.values()), [took.sample((backend, p), self._tokens(p)) for p in parts])
        base = name == case.of
        parent = parents.get(NONE if base else case.of)
        target = (self.speed if name == NONE else None) if base else self.targets.get(case.percent)
        result = row(name, sample, parent, target, self.ours.bytes() / 2**20)
        if base:
            parents[name] = as_parent(result, sample)
            if (backend, name) == self.root:
                self.anchor = parents[name]
        return result | about | self._utilisation(sample, result["tokens_per_second"], took)

    def _plain(self, rounds: int, seconds: float) -> dict[str, Any]:
        """The row of the plain model, which is freed afterwards."""
        about = {"backend": "public", "percent": 0, "mixing": [], "mean_of": None}
        try:
            return self._plain_row(rounds, seconds, about)  # the model is a local there, gone when it returns
        except Exception as error:
            return failure(PLAIN, described(error)) | about
        finally:
            if self.device.type == "cuda":
                torch.compiler.reset()
            release_memory()

    def _plain_row(self, rounds: int, seconds: float, about: dict[str, Any]) -> dict[str, Any]:
        plain = PlainSteps(self.setting, self.device, self.dtype)
        batches = self._batches(self.taken[NONE], self.device)
        steps = self._steps([self.root]) | {PLAIN: LocalStep(partial(plain.step, batches))}
        took = self._take(steps, rounds, seconds)
        _must_train(took, plain, [PLAIN])
        if PLAIN in took.failed:
            return failure(PLAIN, took.failed[PLAIN]) | about
        sample = took.sample(PLAIN, self._tokens(NONE))
        result = row(PLAIN, sample, self._anchor_of(took), None, plain.bytes() / 2**20)
        return result | about | self._utilisation(sample, result["tokens_per_second"], took)

    def _utilisation(self, sample: Sample, speed: float, took: Rounds[Step]) -> dict[str, float]:
        """Share of a matmul's rate in the same rounds, and of the data sheet's, that the model FLOPs come to."""
        shares = {}
        if MATMUL not in took.failed:
            rate = self.matmul_flops / took.sample(MATMUL, 0).wall
            reached = percentiles(self.flops * sample.tokens / sample.wall / rate)["p50"]
            shares = {"flops_utilisation": reached, "matmul_tflops": percentiles(rate / 1e12)["p50"]}
        if self.device.type == "cuda" and (listed := DATASHEET.get(torch.cuda.get_device_name())):
            shares["datasheet_utilisation"] = round(self.flops * speed / listed / 1e12, 4)
        return shares


def _must_train(took: Rounds[Step], model: Ours | PlainSteps, names: list[Step]) -> None:
    if model.loss is not None and not torch.isfinite(model.loss):
        for name in names:
            took.failed.setdefault(name, f"loss {model.loss.item()}: these steps do not train")


def _matmul(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A big matmul, and its FLOPs."""
    n = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out), 2 * n**3
