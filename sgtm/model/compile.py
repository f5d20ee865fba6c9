"""`train.compile: blocks`: each transformer block is one compiled graph.

A block's graph depends on the masks of a micro-batch through a handle and a few booleans (`MaskPlan.signature`), so it
serves every micro-batch with the same booleans, whatever its labels. Only the bound `forward` of a block is compiled:
DeepSpeed's hooks on a module run around the graph, not inside it. Under ZeRO 3 the engine therefore gathers the weights
of a block at once (sgtm/distributed/engine.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sgtm.model.transformer import Transformer

# All blocks share one cache in torch, whose default limit is 8: signatures, times two for evaluation, times the kinds
# of layers (local and global attention, masked and not).
MAX_GRAPHS = 64

REMEDIES = {
    "cpu": "install a C++ compiler (apt install g++, or set CXX to one) and Python's headers (python3-dev)",
    "cuda": "install Triton (pip install triton), a C compiler (apt install gcc) and Python's headers (python3-dev)",
}


def compile_blocks(model: Transformer, backend: str = "inductor") -> None:
    """Compile every block's forward and backward pass, at their first use; in place.

    backend  of `torch.compile`
    torch raises on a graph break or on more than MAX_GRAPHS graphs, instead of running slowly.
    """
    import torch._dynamo.config as limits  # takes a second to import

    limits.recompile_limit = max(limits.recompile_limit, MAX_GRAPHS)
    for block in model.blocks:
        compiled = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)
        block.forward = compiled  # type: ignore[method-assign]  # of this block alone
    model.compiled = True


def check_compiler(device: str, kernels: str, backend: str = "inductor") -> None:
    """Compile a function of one line.

    device   `cpu` or `cuda`
    kernels  resolved kernel backend of the run
    Raises ValueError with the reason and the remedy where blocks cannot be compiled here.
    """
    if kernels == "reference":
        raise ValueError(
            "train.compile blocks: the kernel backend reference is not compiled; "
            "set kernels.backend to runs or triton, or train.compile to off"
        )
    try:
        torch.compile(lambda x: x * 2 + 1, fullgraph=True, backend=backend)(torch.ones(8, device=device))
    except Exception as error:  # torch raises what its code generators raise, wrapped in its own
        raise ValueError(
            f"train.compile blocks: torch.compile does not work on this machine ({_reason(error)}); "
            f"{REMEDIES[device]}, or set train.compile to off"
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of the innermost error."""
    while (inner := error.__cause__ or getattr(error, "inner_exception", None)) is not None:
        error = inner
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
