# shellcheck shell=bash
# Sourced by every script here: the virtual environment, and what a node needs before Python starts.
# Every value can be set from outside and is then left alone.

LAUNCH_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
REPO_DIR="$(dirname "$LAUNCH_DIR")"
if [[ -z "${VIRTUAL_ENV:-}" && -f "$REPO_DIR/.venv/bin/activate" ]]; then
    # shellcheck source=/dev/null
    source "$REPO_DIR/.venv/bin/activate"
fi

GPUS="$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)"

# Processes on this node: one for each GPU, or one on the CPU.
if [[ -z "${NPROC:-}" ]]; then
    NPROC=$((GPUS > 0 ? GPUS : 1))
fi
if [[ -z "${DS_ACCELERATOR:-}" ]] && ((GPUS == 0)); then
    export DS_ACCELERATOR=cpu # the deepspeed launcher asks before sgtm can answer
fi

# Threads for what a rank computes beside its GPU: torchrun would give it one, the other launchers one for each core of
# the node, and so NPROC times as many as there are. On CPUs sgtm divides the cores itself.
if [[ -z "${OMP_NUM_THREADS:-}" ]] && ((GPUS > 0)); then
    cores="$(nproc)"
    export OMP_NUM_THREADS=$((cores > NPROC ? cores / NPROC : 1))
fi

# Steps differ in shape by their labels. Segments that grow leave fewer holes between blocks of many sizes (torch, "CUDA
# semantics"). The older name of the setting counts as set.
if [[ -z "${PYTORCH_CUDA_ALLOC_CONF:-}" ]]; then
    export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
fi

# NCCL prints why it failed; by default it prints nothing, and torch only "unhandled system error". What ends a
# rank whose collective hangs, and writes down what each rank was in, is torch's default
# (TORCH_NCCL_ASYNC_ERROR_HANDLING, TORCH_NCCL_DUMP_ON_TIMEOUT).
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Compiled kernels go to a disk of the node: on a shared home directory, ranks of different nodes race for the same files.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/sgtm-triton-$(id -u)}"
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}" # a killed rank's last words reach the log

# torchrun passes on to its workers what ends a run early, SLURM's SIGUSR1 too, and gives them this long to save a
# checkpoint before it kills them (its own default is 30 s).
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
