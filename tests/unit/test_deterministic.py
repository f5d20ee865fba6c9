"""What `kernels.deterministic` promises on a GPU, as far as it can be seen without one."""

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import FAMILIES, MIXINGS, STRATEGIES, gradients, model_of, random_step
from torch.utils._python_dispatch import TorchDispatchMode

import sgtm
import sgtm_kernels
from sgtm_kernels.testing import poisoned_memory

# Ops that raise on CUDA tensors under torch.use_deterministic_algorithms(True), by its documentation (torch 2.13); of
# cumsum the floating one.
REFUSED = re.compile(
    r"(avg_pool3d|adaptive_(avg|max)_pool[23]d|fractional_max_pool[23]d|upsample_(linear1d|(bi|tri)linear\w*|bicubic2d)"
    r"|reflection_pad[123]d)_backward|max_unpool[23]d|nll_loss2d_(forward|backward)|_ctc_loss_backward"
    r"|_embedding_bag\w*backward|put_?|histc|bincount|median|nanmedian|kthvalue|grid_sampler_[23]d_backward|cumsum_?"
    r"|scatter_reduce_?"
)


class Ops(TorchDispatchMode):
    """Collects the names of the ops that run inside."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().partition("::")[2].partition(".")[0]
        if not (name.startswith("cumsum") and not args[0].is_floating_point()):
            self.names.add(name)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_step_takes_no_op_that_is_refused(mixing, family, backend):
    """Whole forward and backward passes; the optimizer is torch's fused AdamW or ours."""
    model = model_of(family, backend)
    with Ops() as ops:
        gradients(model, random_step(mixing), STRATEGIES["sgtm+masked"]())
    assert {"mm", "bmm"} & ops.names
    assert not [name for name in ops.names if REFUSED.fullmatch(name)]


def test_refused_ops_are_noticed():
    with Ops() as ops:
        torch.ones(3).cumsum(0), torch.ones(3).median(0), torch.ones(3, dtype=torch.int64).cumsum(0)
    assert [name for name in sorted(ops.names) if REFUSED.fullmatch(name)] == ["cumsum", "median"]
    with Ops() as ops:
        torch.ones(3, dtype=torch.int64).cumsum(0)
    assert not ops.names & {"cumsum"}


@pytest.mark.parametrize("package", [sgtm, sgtm_kernels])
def test_nothing_settles_for_a_warning(package):
    """With `warn_only`, SDPA's backward passes on a GPU are not deterministic, and nothing shows."""
    for file in Path(package.__file__).parent.rglob("*.py"):
        names = set(words(file))
        assert not names & {"warn_only", "_set_deterministic_algorithms"}, file
        assert "set_deterministic_debug_mode" not in names or file.name == "testing.py", file


def words(file: Path) -> Iterator[str]:
    """Names and whole strings of a file's code; docstrings are strings of more than one word."""
    for token in tokenize.generate_tokens(io.StringIO(file.read_text("utf-8")).readline):
        if token.type in (tokenize.NAME, tokenize.STRING):
            yield token.string.strip("\"'")


def test_poisoned_memory_leaves_the_mode_as_it_was():
    """The self-check poisons memory before the first step of a run."""
    for mode in ("default", "warn", "error"):
        torch.set_deterministic_debug_mode(mode)
        try:
            before = torch.get_deterministic_debug_mode()
            with poisoned_memory():
                assert torch.get_deterministic_debug_mode() == 2
            assert torch.get_deterministic_debug_mode() == before == ["default", "warn", "error"].index(mode)
        finally:
            torch.set_deterministic_debug_mode("default")
