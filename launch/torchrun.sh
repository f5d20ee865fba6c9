#!/usr/bin/env bash
# Several nodes without ssh: run the same command on each of them.
#   NNODES=2 RDZV=node-0:29400 launch/torchrun.sh FILE.yaml
# NNODES  number of nodes
# RDZV    HOST:PORT of any one of them, reachable from all (c10d rendezvous)
# JOB     name of the job; different for two jobs that share a rendezvous host
# WAIT    seconds that torchrun may outlive its ranks (330)
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
: "${NNODES:?set NNODES to the number of nodes}"
: "${RDZV:?set RDZV to HOST:PORT of one of the nodes, the same on all}"
WAIT="${WAIT:-330}" # more than the 300 s for which torchrun waits, after a run that has ended well, for the other nodes

# Cut off from the rendezvous host, torchrun waits in TCP for a quarter of an hour, deaf to signals, though its ranks
# have ended. One of which it has not heard yet is a zombie.
end_after_the_ranks() {
    local agent="$1" begun=0 ended=$SECONDS
    while sleep 1 && [[ "$(ps --pid "$agent" -o stat=)" == [!Z]* ]]; do
        # shellcheck disable=SC2009
        if ps --ppid "$agent" -o stat= | grep -qv '^Z'; then
            begun=1 ended=$SECONDS
        elif ((begun && SECONDS - ended >= WAIT)); then
            echo "error: $(hostname): the ranks of this node ended $WAIT s ago, but torchrun still waits for other" \
                "nodes or for RDZV=$RDZV; killed" >&2
            kill -KILL "$agent"
        fi
    done
}
(end_after_the_ranks "$$" &) # twice forked: no child of torchrun

exec torchrun \
    --nnodes "$NNODES" --nproc-per-node "$NPROC" \
    --rdzv-backend c10d --rdzv-endpoint "$RDZV" --rdzv-id "${JOB:-sgtm}" \
    --max-restarts 0 \
    -m sgtm train "$@"
