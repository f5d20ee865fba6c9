"""AdamW on slices: the formula of the paper, in all backends, and not a bit outside the slices."""

from __future__ import annotations

import math
import os
from itertools import pairwise

import pytest
import torch

from sgtm_kernels.adamw import Tensors, Update, WeightSlice, adamw, prepare
from sgtm_kernels.dispatch import BACKENDS, pick

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


def test_the_kernel_rounds_every_element_alike():
    """Bits depend neither on where a slice begins or ends nor on whether its memory can be moved 16 bytes at a time."""
    whole, cut, shifted = flat_tensors(5000), flat_tensors(5000), flat_tensors(5000)
    adamw([Update(*whole.values(), 4, 0.1)], LR, BETAS, EPS, "triton")
    edges = [0, 3, 4, 1029, 1032, 2056, 4999, 5000]
    adamw([Update(*(t[a:b] for t in cut.values()), 4, 0.1) for a, b in pairwise(edges)], LR, BETAS, EPS, "triton")
    room = torch.zeros(5001)
    room[1:] = shifted["weight"]
    shifted["weight"] = room[1:]  # at another distance from a border than the others
    adamw([Update(*shifted.values(), 4, 0.1)], LR, BETAS, EPS, "triton")
    for name in NAMES:
        assert torch.equal(cut[name], whole[name]), name
        assert torch.equal(shifted[name], whole[name]), name


@pytest.mark.parametrize(("offset", "grad_offset", "aligned"), [(0, 0, 1), (5, 5, 1), (5, 9, 1), (5, 6, 0), (0, 2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_aligned_tensors_are_addressed_from_a_border(offset, grad_offset, aligned, dtype):
    """What the kernel moves 16 bytes at a time (8 of half precision) lies at such borders in all four tensors."""
    flat = flat_tensors(100)
    weight, _, *moments = (t[offset : offset + 50] for t in flat.values())
    grad = flat["grad"].to(dtype)[grad_offset : grad_offset + 50]
    step = pick("adamw", "triton").prepare([WeightSlice(0, 0, 50, 0, 0.1)], BETAS, EPS)
    table, numbers = step.table([Tensors(weight, grad, *moments)], [1], LR)
    *addresses, shift, _ = table[:6].tolist()
    assert (numbers, shift >= 0, len(step.blocks)) == (12, aligned, 1)
    for address, tensor in zip(addresses, (weight, grad, *moments), strict=True):
        assert address + max(shift, 0) * tensor.element_size() == tensor.data_ptr()
        assert not aligned or address % (4 * tensor.element_size()) == 0


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="looks into Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_promises_the_compiler_what_holds(monkeypatch, dtype):
    """Addresses and offsets that it calls multiples are multiples: else a GPU refuses to move 16 bytes from there."""
    from triton.runtime.interpreter import TensorHandle

    promised = []

    def set_attr(handle, name, values):
        if name == "tt.divisibility":
            promised.extend(values)
            assert (handle.data % values[0] == 0).all()

    monkeypatch.setattr(TensorHandle, "set_attr", set_attr)
    flat = flat_tensors(9000)
    tensors = Tensors(*(t[1:] for t in flat.values()))._replace(grad=flat["grad"].to(dtype)[1:])
    slices = [WeightSlice(0, 0, 1030, 0, 0.1), WeightSlice(0, 1030, 1031, 0, 0.0), WeightSlice(0, 1033, 8999, 0, 0.1)]
    prepare(slices, BETAS, EPS, "triton")([tensors], [1], LR, 1.0)
    assert set(promised) == {4, 16} | ({8} if dtype == torch.float16 else set())


@pytest.mark.parametrize("slices", [1, 2, 3, 8, 33])
def test_the_kernel_finds_its_slice(slices):
    """Slices of none, one and several blocks, each with numbers of its own, in any order in memory."""
    flat = flat_tensors(60_000)
    before = {name: t.double() for name, t in flat.items()}
    lengths = [(1, 1024, 1025, 0, 3000, 7, 2047)[i % 7] for i in range(slices)]
    edges = [10, *(10 + sum(lengths[: i + 1]) for i in range(slices))]  # those of 1024 begin between two borders
    ranges = [(a, b, i + 1, 0.1 * i) for i, (a, b) in enumerate(pairwise(edges))]
    updates = [Update(*(t[a:b] for t in flat.values()), step, decay) for a, b, step, decay in ranges]
    adamw(updates[::-1], LR, BETAS, EPS, "triton")
    covered = slice(edges[0], edges[-1])
    for a, b, step, decay in ranges:
        for name, values in formula({name: t[a:b] for name, t in before.items()}, step, decay).items():
            assert b == a or errors(name, flat[name][a:b], values) < 5e-7, (name, a)
    for name in NAMES:
        assert torch.equal(flat[name][: covered.start].double(), before[name][: covered.start])
        assert torch.equal(flat[name][covered.stop :].double(), before[name][covered.stop :])


def test_the_kernel_takes_gradients_of_half_precision():
    """Of both kinds in one call; rounded gradients give what their fp32 values give, bit for bit."""
    half, full = flat_tensors(4000), flat_tensors(4000)
    grad = half["grad"].half()
    full["grad"] = grad.float()
    ranges = [(1, 1500, True), (1500, 1501, False), (1501, 3999, True)]
    updates = []
    for a, b, low in ranges:
        weight, _, *moments = (t[a:b] for t in half.values())
        updates.append(Update(weight, grad[a:b] if low else full["grad"][a:b], *moments, 2, 0.1))
    adamw(updates, LR, BETAS, EPS, "triton")
    adamw([Update(*(t[1:3999] for t in full.values()), 2, 0.1)], LR, BETAS, EPS, "triton")
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        assert torch.equal(half[name], full[name]), name


@pytest.mark.parametrize("wrong", ["dtype", "strides", "length"])
def test_the_kernel_refuses_what_its_addresses_cannot_describe(wrong):
    flat = flat_tensors(10)
    wide = flat["exp_avg"].repeat(2)
    flat["exp_avg"] = {"dtype": flat["exp_avg"].double(), "strides": wide[::2], "length": wide}[wrong]
    with pytest.raises(ValueError, match="fp32" if wrong == "dtype" else "contiguous"):
        adamw([Update(*flat.values(), 1, 0.1)], LR, BETAS, EPS, "triton")


def test_the_kernel_refuses_what_its_slices_cannot_address():
    step, flat = prepare([WeightSlice(0, 0, 11, 0, 0.1)], BETAS, EPS, "triton"), flat_tensors(10)
    with pytest.raises(ValueError, match="ends at 11, behind the 10 elements"):
        step([Tensors(*flat.values())], [1], LR, 1.0)
    step = prepare([WeightSlice(0, 0, 10, 0, 0.1), WeightSlice(1, 0, 10, 0, 0.1)], BETAS, EPS, "triton")
    half = Tensors(flat["weight"], flat["grad"].half(), flat["exp_avg"], flat["exp_avg_sq"])
    with pytest.raises(ValueError, match=r"one dtype, got torch\.float32 and torch\.float16"):
        step([Tensors(*flat.values()), half], [1], LR, 1.0)


def test_tables_are_built_on_the_cpu_whatever_the_default_device():
    tensors = [Tensors(*flat_tensors(n).values()) for n in (7, 2000)]
    slices = [WeightSlice(0, 0, 7, 1, 0.1), WeightSlice(1, 3, 1999, 0, 0.0)]

    def tables():
        step = pick("adamw", "triton").prepare(slices, BETAS, EPS)
        return step.rows, step.blocks, step.table(tensors, [3, 4], LR)[0]

    expected = tables()
    with torch.device("meta"):
        result = tables()
    assert all(t.device.type == "cpu" for t in result) and all(map(torch.equal, result, expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [0.7, 1e-3])
def test_a_factor_is_as_good_as_a_clipped_gradient(backend, factor):
    """Bit for bit, with a factor that fp32 rounds; what no slice covers of the gradient stays as it is."""
    factor = float(torch.tensor(factor))
    folded, clipped = flat_tensors(3000), flat_tensors(3000)
    clipped["grad"].mul_(torch.tensor(factor))
    ranges = [(1, 1500, 1, 0.1), (1501, 2999, 9, 0.0)]
    for flat, f in ((folded, factor), (clipped, 1.0)):
        adamw([Update(*(t[a:b] for t in flat.values()), *rest) for a, b, *rest in ranges], LR, BETAS, EPS, backend, f)
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        assert torch.equal(folded[name], clipped[name]), name
    grad = flat_tensors(3000)["grad"]
    assert all(folded["grad"][index] == grad[index] for index in (0, 1500, 2999))


@pytest.mark.parametrize("backend", BACKENDS)
def test_prepared_steps_are_single_ones(backend):
    """Bit for bit over several steps: gradients at new addresses, other counts and rates, tensors that move, slices of
    one tensor between those of another."""
    ranges = [(0, 3, 1027, 0, 0.1), (1, 0, 1025, 2, 0.0), (0, 1027, 2051, 1, 0.1), (0, 2060, 2100, 0, 0.0)]
    slices = [WeightSlice(*r) for r in ranges]
    ours, theirs = ([flat_tensors(n, seed=n) for n in (2100, 1030)] for _ in range(2))
    step = prepare(slices, BETAS, EPS, backend)
    for number in range(1, 5):
        counts, lr = [number, 3 * number, 1], LR / number
        for tensors in (*ours, *theirs):
            generator = torch.Generator().manual_seed(number)
            n = len(tensors["weight"])
            tensors["grad"] = torch.randn(n + number, generator=generator)[number:]  # at another distance from a border
        if number == 3:
            ours = [{name: t.clone() for name, t in tensors.items()} for tensors in ours]
        step([Tensors(*tensors.values()) for tensors in ours], counts, lr, 1.0)
        for tensor, start, end, counter, decay in slices:
            views = (t[start:end] for t in theirs[tensor].values())
            adamw([Update(*views, counts[counter], decay)], lr, BETAS, EPS, backend)
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(mine[name], other[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_update_is_fine(backend):
    adamw([], LR, BETAS, EPS, backend)
    flat = flat_tensors(10)
    prepare([], BETAS, EPS, backend)([Tensors(*flat.values())], [], LR, 0.5)
    assert all(torch.equal(t, flat_tensors(10)[name]) for name, t in flat.items())


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
