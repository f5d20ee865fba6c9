#!/usr/bin/env bash
# The deepspeed launcher: several nodes over ssh by a hostfile, or this machine alone where there is none.
#   HOSTFILE=launch/hostfile launch/deepspeed.sh FILE.yaml      (see hostfile.example)
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

if [[ -n "${HOSTFILE:-}" ]]; then
    [[ -f "$HOSTFILE" ]] || { echo "error: HOSTFILE $HOSTFILE does not exist; see launch/hostfile.example" >&2; exit 1; }
    exec deepspeed --hostfile "$HOSTFILE" --module sgtm train "$@"
fi
exec deepspeed --num_gpus "$NPROC" --module sgtm train "$@"
