#!/usr/bin/env bash
# Trains under Open MPI 4, one process a GPU.
#
#   PYTHON=/shared/venv/bin/python PROCESSES=16 HOSTS=node1:8,node2:8 launch/mpirun.sh \
#       --config=configs/llama70b_regression.py --config.workdir=/shared/runs/llama70b
#
# Set      PYTHON: a Python with rmjax that every host sees.
#          PROCESSES: how many, which is the number of GPUs.
#          HOSTS: HOST:PROCESSES,...; leave it out for this host alone. Start this on the first of
#          them: the processes connect to the host of mpirun, where process 0 must be.
#          Run in the root of the repository; the workdir is on a disk that all hosts share.
# Watch    the output is process 0's, and everybody's errors.
# Stop     kill -TERM this script, not mpirun: it passes the signal on to the processes here, and
#          all save and end. Ctrl-C ends at once.
# Resumes  the same command.
# Checked  run with Debian's Open MPI 4.1.4, two processes on the CPU of one host
#          (tests/launch/test_run.py); no GPU, not over ssh.

set -euo pipefail
: "${PYTHON:?set it to a Python with rmjax that every host sees}"
: "${PROCESSES:?set it to the number of processes, one a GPU}"
# JAX takes 75 % of a GPU unless told otherwise; nothing else runs on these.
export XLA_CLIENT_MEM_FRACTION="${XLA_CLIENT_MEM_FRACTION:-.92}"
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"

# mpirun gives each process a terminal of its own, on which it would draw a progress bar.
[[ -t 1 ]] || export TTY_COMPATIBLE=0

# mpirun would kill the processes a second after it told them of SIGTERM: it must not see it.
signalled=
stop() {
    signalled=yes
    pkill -TERM --parent "$mpirun"
}
trap stop TERM

mpirun -np "$PROCESSES" ${HOSTS:+--host "$HOSTS"} --bind-to none \
    -x XLA_CLIENT_MEM_FRACTION -x XLA_FLAGS \
    "$PYTHON" -m rmjax.train "$@" &
mpirun=$!
status=0
wait "$mpirun" || status=$?
while [[ $signalled ]]; do # a signal ends `wait`, not mpirun
    signalled=
    status=0
    wait "$mpirun" || status=$?
done
exit "$status"
