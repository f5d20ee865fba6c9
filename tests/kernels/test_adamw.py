"""AdamW on slices: the formula of the paper, in both backends, and not a bit outside the slices."""

from __future__ import annotations

import math

import pytest
import torch

from sgtm_kernels.adamw import Update, adamw
from sgtm_kernels.dispatch import BACKENDS

LR, BETAS, EPS = 3e-3, (0.9, 0.95), 1e-8
NAMES = ("weight", "grad", "exp_avg", "exp_avg_sq")


def flat_tensors(n: int, seed: int = 0, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(n, generator=generator, dtype=torch.float64) for name in NAMES}
    tensors["weight"] *= LR  # as small as an update, so that no error of it hides in the rounding of the weight
    tensors["exp_avg_sq"] = tensors["exp_avg_sq"].square()
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def formula(t: dict[str, torch.Tensor], step: int, decay: float) -> dict[str, torch.Tensor]:
    """The update in fp64, out of place."""
    beta1, beta2 = BETAS
    m = beta1 * t["exp_avg"] + (1 - beta1) * t["grad"]
    v = beta2 * t["exp_avg_sq"] + (1 - beta2) * t["grad"] ** 2
    step_size = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + EPS)
    return {"weight": t["weight"] * (1 - LR * decay) - LR * step_size, "exp_avg": m, "exp_avg_sq": v}


def errors(name: str, values: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error, relative to an update of a weight and to a gradient of 1."""
    scale = LR if name == "weight" else 1.0
    return float(((values.double() - expected).abs() / (expected.abs() + scale)).max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 7, 63, 1000])
@pytest.mark.parametrize(("step", "decay"), [(1, 0.0), (1, 0.1), (2, 0.1), (1000, 0.3)])
def test_formula(backend, n, step, decay):
    flat = flat_tensors(n)
    expected = formula({name: t.double() for name, t in flat.items()}, step, decay)
    adamw([Update(*flat.values(), step, decay)], LR, BETAS, EPS, backend)
    for name, values in expected.items():
        assert errors(name, flat[name], values) < 5e-7, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_updates_match_torch(backend):
    """Ten steps of a constant count and decay are torch's own AdamW."""
    flat = flat_tensors(333)
    theirs = torch.nn.Parameter(flat["weight"].clone())
    optimizer = torch.optim.AdamW([theirs], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.1, foreach=False)
    for name in ("exp_avg", "exp_avg_sq"):
        flat[name].zero_()
    for step in range(1, 11):
        flat["grad"].copy_(torch.randn(333, generator=torch.Generator().manual_seed(step)) * math.sin(step))
        theirs.grad = flat["grad"].clone()
        optimizer.step()
        adamw([Update(*flat.values(), step, 0.1)], LR, BETAS, EPS, backend)
    assert torch.allclose(flat["weight"], theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_outside_the_slices_nothing_changes(backend):
    """Slices of odd lengths and offsets, each with its own step and decay; the gaps and the gradient keep every bit."""
    flat = flat_tensors(200)
    before = {name: t.clone() for name, t in flat.items()}
    ranges = [(3, 20, 1, 0.1), (20, 21, 7, 0.0), (50, 113, 3, 0.1), (150, 200, 2, 0.0)]
    updates = [Update(*(t[start:end] for t in flat.values()), step, decay) for start, end, step, decay in ranges]
    adamw(updates, LR, BETAS, EPS, backend)

    covered = torch.zeros(200, dtype=torch.bool)
    for start, end, step, decay in ranges:
        covered[start:end] = True
        expected = formula({name: t[start:end].double() for name, t in before.items()}, step, decay)
        for name, values in expected.items():
            assert errors(name, flat[name][start:end], values) < 5e-7, (name, start)
    for name in NAMES:
        assert torch.equal(flat[name][~covered], before[name][~covered]), f"{backend} writes {name} outside its slices"
    assert torch.equal(flat["grad"], before["grad"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slice_does_not_depend_on_its_neighbours(backend):
    """Bitwise the same alone and among others: freezing a neighbour must not change what is live."""
    together, alone = flat_tensors(301), flat_tensors(301)
    ranges = [(0, 37), (37, 150), (150, 301)]
    adamw([Update(*(t[a:b] for t in together.values()), 4, 0.1) for a, b in ranges], LR, BETAS, EPS, backend)
    adamw([Update(*(t[37:150] for t in alone.values()), 4, 0.1)], LR, BETAS, EPS, backend)
    assert all(torch.equal(together[name][37:150], alone[name][37:150]) for name in NAMES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_update_is_fine(backend):
    adamw([], LR, BETAS, EPS, backend)


@pytest.mark.gpu
@pytest.mark.cpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_the_gpu_as_on_the_cpu(backend):
    cpu = flat_tensors(5000)
    gpu = {name: t.cuda() for name, t in cpu.items()}
    for tensors, how in ((cpu, "reference"), (gpu, backend)):
        updates = [Update(*(t[a:b] for t in tensors.values()), 3, 0.1) for a, b in [(1, 18), (18, 4999)]]
        adamw(updates, LR, BETAS, EPS, how)
    for name in NAMES:
        assert torch.allclose(gpu[name].cpu(), cpu[name], rtol=1e-5, atol=1e-7), name
        assert torch.equal(gpu[name][:1].cpu(), cpu[name][:1])
