#!/usr/bin/env bash
# Several nodes without ssh: run the same command on each of them.
#   NNODES=2 RDZV=node-0:29400 launch/torchrun.sh FILE.yaml
# NNODES  number of nodes
# RDZV    HOST:PORT of any one of them, reachable from all (c10d rendezvous)
# JOB     name of the job; different for two jobs that share a rendezvous host
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
: "${NNODES:?set NNODES to the number of nodes}"
: "${RDZV:?set RDZV to HOST:PORT of one of the nodes, the same on all}"

exec torchrun \
    --nnodes "$NNODES" --nproc-per-node "$NPROC" \
    --rdzv-backend c10d --rdzv-endpoint "$RDZV" --rdzv-id "${JOB:-sgtm}" \
    --max-restarts 0 \
    -m sgtm train "$@"
