#!/usr/bin/env bash
# The deepspeed launcher: several nodes over ssh by a hostfile, or this machine alone where there is none.
#   HOSTFILE=launch/hostfile launch/deepspeed.sh FILE.yaml      (see hostfile.example)
# MASTER_PORT  of the first node, where the ranks meet (29500); different for two jobs on the same nodes
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

options=(--master_port "${MASTER_PORT:-29500}" --module)
if [[ -z "${HOSTFILE:-}" ]]; then
    exec deepspeed --num_gpus "$NPROC" "${options[@]}" sgtm train "$@"
fi
[[ -f "$HOSTFILE" ]] || { echo "error: HOSTFILE $HOSTFILE does not exist; see launch/hostfile.example" >&2; exit 1; }

# Of the environment DeepSpeed passes on only PYTHON... and a few more, and what is in a file: here the settings of
# env.sh and of the network, and what the user has in .deepspeed_env. The file is deleted while it is open.
passed_on="$(mktemp)"
env | grep -E '^(DS_ACCELERATOR|TRITON_CACHE_DIR|OMP_NUM_THREADS|(TORCH|PYTORCH|NCCL|GLOO|SGTM)_[A-Z_]*)=' >"$passed_on"
cat ~/.deepspeed_env .deepspeed_env >>"$passed_on" 2>/dev/null || true
exec {file}<"$passed_on"
rm "$passed_on"
export DS_ENV_FILE="${DS_ENV_FILE:-/dev/fd/$file}"
exec deepspeed --hostfile "$HOSTFILE" "${options[@]}" sgtm train "$@"
