#!/usr/bin/env bash
# sbatch recipes/launch/slurm.sh recipes/hardened.toml [flags], from the checkout, its environment activated: before the
# time limit the run saves and stops, and the job queues again to continue it (resume = "auto", the default).
# On nodes without GPUs delete --gpus-per-node, and add the recipe's --device cpu.
#SBATCH --job-name=mygpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

nodes=$SLURM_JOB_NUM_NODES
processes=$((nodes * ${SLURM_GPUS_ON_NODE:-1}))
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=${hosts%%$'\n'*}
# One of its own for each job on a node, and below those that the kernel gives out.
port=$((15000 + SLURM_JOB_ID % 15000))

# The launchers are signalled by scancel, which by default leaves this script out; srun would answer SIGTERM by killing
# them. They pass it on, and kill after 30 s: a step and its save have to fit in.
signals=0
trap 'signals=$((signals + 1)); scancel --signal=TERM "$SLURM_JOB_ID" || true' TERM

# In the background, as bash runs a trap only after a command in the foreground. --wait, since a launcher that fails
# before it has met the others leaves them waiting; not --kill-on-bad-exit, which could break off the last save.
# shellcheck disable=SC2016 # each node has a SLURM_NODEID of its own
srun --nodes="$nodes" --ntasks="$nodes" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=60 \
    bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
    --config_file recipes/launch/multinode.yaml --num_machines "$nodes" --num_processes "$processes" \
    --main_process_ip "$address" --main_process_port "$port" scripts/train.py "$@" &
step=$!
until before=$signals status=0; wait "$step" || status=$?; ((signals == before)); do :; done # again after each trap
trap '' TERM

# Interrupted, and neither done nor failed; nor cancelled, for scancel sends SIGTERM as well. Where jobs are preempted
# after a grace time, PreemptParameters=send_user_signal lets this script hear of it.
if ((signals && status)) && [[ $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING* ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
