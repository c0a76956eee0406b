#!/bin/bash
# Two SLURM nodes with eight GPUs each, requeued until the run is finished.
#
#   sbatch recipes/accelerate/slurm_two_nodes.sh pretrain recipes/in1k_vit_large_etpp.yaml \
#       data.root=/path/to/imagenet output=/shared/runs/vit_large
#
# `output=` must be given, as a folder that all nodes see. Another accelerate configuration: set
# ACCELERATE_CONFIG. Other resources: sbatch's own options, in front of this file.
#
# Two minutes before the time limit SLURM sends SIGTERM to the launcher on each node, and that to its
# processes. They finish their step, write one checkpoint and leave "stopped" in the run folder's status.json;
# this script then puts the job back in the queue, and the same command resumes it. A run that is
# finished or failed is not requeued.
# Memory:  as the configuration that it launches.
# Checked: tests run it with stand-ins for srun and scontrol. With stand-ins that start two launchers on one
#          machine it was stopped, requeued and finished a run once (two CPU processes over gloo, 2026-11-24);
#          never run under SLURM.
#SBATCH --job-name=etpp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=etpp-%j.log

set -uo pipefail

# The value of `output=` among the command's arguments; the last one counts.
output_of() {
    local argument output=""
    for argument in "$@"; do
        if [[ "$argument" == output=* ]]; then
            output="${argument#output=}"
        fi
    done
    printf '%s' "$output"
}

# How the run stands by its status.json: running, stopped, finished or failed; nothing without that file.
run_state() {
    python -c 'import json, sys; print(json.load(open(sys.argv[1]))["state"])' "$1/status.json" 2>/dev/null
}

# Put the job back in the queue if its run was stopped before its end.
requeue_if_stopped() {
    if [[ "$(run_state "$1")" == stopped ]]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
}

main() {
    local output result
    output="$(output_of "$@")"
    if [[ -z "$output" ]]; then
        echo "output= must be given: the run folder, on a disk that all nodes see" >&2
        return 2
    fi
    # The state that an earlier part of the run left must not be taken for this one's.
    rm -f "$output/status.json"

    export ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-recipes/accelerate/two_nodes.yaml}"
    export MAIN_HOST MAIN_PORT NUM_PROCESSES
    MAIN_HOST="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000))
    NUM_PROCESSES=$((SLURM_JOB_NUM_NODES * ${SLURM_GPUS_ON_NODE:-8}))
    # How long a launcher lets its processes finish; without it they are killed after 30 seconds.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110

    # A signal to this shell waits until srun has ended.
    trap : TERM
    # The processes that do not write the checkpoint end first: that must not end the others at once.
    # shellcheck disable=SC2016  # Each node's own shell expands it.
    srun --kill-on-bad-exit=0 --wait=150 bash -c 'exec accelerate launch --config_file "$ACCELERATE_CONFIG" \
        --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$NUM_PROCESSES" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$MAIN_HOST" --main_process_port "$MAIN_PORT" -m etpp_ssl "$@"' etpp "$@"
    result=$?
    requeue_if_stopped "$output"
    return "$result"
}

# Sourced, the file offers its functions only.
if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    main "$@"
fi
