#!/usr/bin/env bash
# Trains on several slices of Cloud TPU: the mesh's data axis goes over the slices, so that only
# gradients cross the slower network between them.
#
#   export NAME=rm SLICES=2 ZONE=us-east5-a TYPE=v5p-128 VERSION=v2-alpha-tpuv5 \
#       NFS=10.0.0.2:/share
#   launch/tpu_multislice.sh request
#   launch/tpu_multislice.sh state      # until it says ACTIVE
#   launch/tpu_multislice.sh setup
#   launch/tpu_multislice.sh train --config=configs/llama70b_regression.py \
#       --config.workdir=/mnt/shared/runs/llama70b
#   launch/tpu_multislice.sh watch | stop | delete
#
# Set      as in launch/tpu_pod.sh, and SLICES: how many slices of TYPE. `train` adds
#          --config.mesh.data=SLICES. The TPU software tells each host of the other slices.
# Watch    launch/tpu_multislice.sh watch: host 0 of slice 0, which speaks for all.
# Stop     launch/tpu_multislice.sh stop: saves first. delete: the slices are gone.
# Resumes  train with the same arguments, after request and setup if the slices are new; another
#          number of slices is fine.
# Checked  with bash -n and shellcheck, its flags against gcloud 528's own table; no TPU.

set -euo pipefail
: "${NAME:?the name of the request}" "${ZONE:?its zone}"
tpus() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }
on() { # NODES WORKERS ARGUMENTS
    tpus ssh --node="$1" --worker="$2" \
        --command="cd rmjax && launch/tpu_worker.sh $(printf '%q ' "${@:3}")"
}

case "${1:?request, state, setup, train, watch, stop or delete}" in
request)
    read -ra options <<< "${OPTIONS:-}"
    tpus create --node-prefix="$NAME" --node-count="${SLICES:?how many slices}" \
        --accelerator-type="${TYPE:?of a slice: v5p-128, for one}" \
        --runtime-version="${VERSION:?v2-alpha-tpuv5, for one}" "${options[@]}"
    ;;
state) tpus describe --format="value(state.state)" ;;
setup)
    code=$(mktemp)
    trap 'rm "$code"' EXIT
    git archive --format=tar HEAD > "$code"
    gcloud compute tpus queued-resources scp "$code" "$NAME:rmjax.tar" --zone="$ZONE" \
        --node=all --worker=all
    tpus ssh --node=all --worker=all --command="mkdir -p rmjax && tar -xf rmjax.tar -C rmjax"
    on all all setup "${NFS:?SERVER:/PATH of the shared file system}"
    ;;
train) on all all train --config.mesh.data="${SLICES:?how many slices}" "${@:2}" ;;
watch) on 0 0 watch ;;
stop) on all all stop ;;
delete) tpus delete --force ;;
*)
    echo "$1: request, state, setup, train, watch, stop or delete" >&2
    exit 1
    ;;
esac
