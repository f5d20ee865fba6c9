# shellcheck shell=bash
# Sourced by every script here: the virtual environment, and what a node needs before Python starts.
# Every value can be set from outside and is then left alone.

LAUNCH_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
REPO_DIR="$(dirname "$LAUNCH_DIR")"
if [[ -z "${VIRTUAL_ENV:-}" && -f "$REPO_DIR/.venv/bin/activate" ]]; then
    # shellcheck source=/dev/null
    source "$REPO_DIR/.venv/bin/activate"
fi

gpus() { { nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l; }

# Processes on this node: one for each GPU, or one on the CPU.
if [[ -z "${NPROC:-}" ]]; then
    NPROC="$(gpus)"
    ((NPROC > 0)) || NPROC=1
fi
if [[ -z "${DS_ACCELERATOR:-}" ]] && (($(gpus) == 0)); then
    export DS_ACCELERATOR=cpu # the deepspeed launcher asks before sgtm can answer
fi

# Compiled kernels go to a disk of the node: on a shared home directory, ranks of different nodes race for the same files.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/sgtm-triton-$(id -u)}"
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}" # a killed rank's last words reach the log

# torchrun passes on to its workers what ends a run early, SLURM's SIGUSR1 too, and gives them this long to save a
# checkpoint before it kills them (its own default is 30 s).
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
