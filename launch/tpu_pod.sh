#!/usr/bin/env bash
# Trains on one slice of Cloud TPU: creates it, installs rmjax on every host, runs, deletes.
#
#   export NAME=rm ZONE=us-east5-a TYPE=v5p-128 VERSION=v2-alpha-tpuv5 NFS=10.0.0.2:/share
#   launch/tpu_pod.sh create
#   launch/tpu_pod.sh train --config=configs/llama70b_regression.py \
#       --config.workdir=/mnt/shared/runs/llama70b
#   launch/tpu_pod.sh watch | stop | delete
#
# Set      NAME, ZONE, TYPE and VERSION: of the slice, its accelerator type and its TPU software
#          version. NFS: a file system that all hosts reach (Filestore, for one), mounted at
#          /mnt/shared. OPTIONS, if you want: more of gcloud's for create, such as --spot.
#          gcloud knows your project; `ssh-add ~/.ssh/google_compute_engine` first, as gcloud asks
#          for where there are many hosts. Run in the root of the repository: its last commit is
#          sent.
# Watch    launch/tpu_pod.sh watch: host 0, which speaks for all.
# Stop     launch/tpu_pod.sh stop: saves first. delete: the slice is gone, /mnt/shared stays.
# Resumes  train with the same arguments, on a new slice after create.
# Checked  with bash -n and shellcheck, its flags against gcloud 528's own table; no TPU.

set -euo pipefail
: "${NAME:?the name of the slice}" "${ZONE:?its zone}"
tpu() { gcloud compute tpus tpu-vm "$1" "$NAME" --zone="$ZONE" "${@:2}"; }
on() { tpu ssh --worker="$1" --command="cd rmjax && launch/tpu_worker.sh $(printf '%q ' "${@:2}")"; }

case "${1:?create, train, watch, stop or delete}" in
create)
    read -ra options <<< "${OPTIONS:-}"
    tpu create --accelerator-type="${TYPE:?v5p-128, for one}" \
        --version="${VERSION:?v2-alpha-tpuv5, for one}" "${options[@]}"
    code=$(mktemp)
    trap 'rm "$code"' EXIT
    git archive --format=tar HEAD > "$code"
    gcloud compute tpus tpu-vm scp "$code" "$NAME:rmjax.tar" --zone="$ZONE" --worker=all
    tpu ssh --worker=all --command="mkdir -p rmjax && tar -xf rmjax.tar -C rmjax"
    on all setup "${NFS:?SERVER:/PATH of the shared file system}"
    ;;
train) on all train "${@:2}" ;;
watch) on 0 watch ;;
stop) on all stop ;;
delete) tpu delete ;;
*)
    echo "$1: create, train, watch, stop or delete" >&2
    exit 1
    ;;
esac
