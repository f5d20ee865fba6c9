#!/usr/bin/env bash
# All GPUs of this machine, or one process on its CPU.  NPROC=2 launch/local.sh quickstart --train.steps 100
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

if ((NPROC == 1)); then
    exec python -m sgtm train "$@"
fi
exec torchrun --standalone --nproc-per-node "$NPROC" -m sgtm train "$@"
