"""The command line of Nsight Compute for one kernel of a training step."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable
from importlib.util import find_spec


def triton_kernels() -> list[str]:
    """Names of this project's Triton kernels, as a profiler shows them; none without Triton."""
    if find_spec("triton") is None:
        return []
    from sgtm_kernels.tools.aot import all_variants

    return sorted({variant.kernel.__name__ for _, _, variant in all_variants()})


def function_name(kernel: str) -> str:
    """What Nsight Compute filters by: `void at::native::f<float>(int)` without result type, namespaces, templates and
    parameters, `f`."""
    kernel = kernel.replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", kernel.removeprefix("void "), maxsplit=1)[0].rpartition("::")[2].strip()


def find_kernel(name: str, seen: Iterable[str]) -> str:
    """The function name that `name` means: a Triton kernel of this project, or a kernel of the trace.

    Raises ValueError that lists both.
    """
    known, trace_kernels = triton_kernels(), sorted({function_name(kernel) for kernel in seen})
    wanted = function_name(name)
    if wanted not in (*known, *trace_kernels):
        raise ValueError(
            f"--kernel {name}: no such kernel; Triton kernels: {', '.join(known) or 'none, Triton is not installed'}; "
            f"kernels of this trace: {', '.join(trace_kernels) or 'none, there is no GPU'}"
        )
    return wanted


def nsight_command(kernel: str, profile: list[str], skip: int, to: str) -> str:
    """Shell command that profiles one launch of `kernel` (a function name).

    profile  arguments of `sgtm profile` that take the same steps, without a profiler of their own
    skip     launches of this kernel to pass over before: those of the warm-up
    to       report to write, without its suffix
    """
    options = ["--kernel-name", f"regex:^{re.escape(kernel)}$", "--launch-skip", str(skip), "--launch-count", "1"]
    options += ["--set", "full", "--force-overwrite", "-o", to]
    return shlex.join(["ncu", *options, sys.executable, "-m", "sgtm", "profile", *profile])
