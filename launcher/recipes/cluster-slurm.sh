#!/bin/bash
# One sweep on whole Slurm nodes.   sbatch cluster-slurm.sh
# Five minutes before its time is up the sweep stops with checkpoints and puts itself into the queue again; it goes on from there.
#SBATCH --job-name=unlearn
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-task=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# Change for your site: the environment, a file system that all nodes share, the experiment.
# The Weights & Biases key is read from ~/.netrc (`wandb login` once); it is neither written here nor given to sbatch.
source "${UNLEARN_VENV:-$HOME/unlearn}/bin/activate"
STORAGE="${SCRATCH:?a file system that all nodes share}/runs"
CONFIG="${1:-olmo-7b-16.yaml}"

# Only who has your token may use this Ray; the home folder carries it to all nodes.
export RAY_AUTH_MODE=token
ray get-auth-token --generate > /dev/null

# Starts Ray on every node, runs the sweep on the first, which is also this script's node, and stops Ray afterwards.
# The sweep leaves its process id, so that the signal reaches it alone: srun would pass it on to all processes of Ray.
HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
SWEEP="$(mktemp)"
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" ray symmetric-run --address "$HEAD:6379" --min-nodes "$SLURM_NNODES" \
  --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_PER_TASK:-0}" -- \
  bash -c 'echo $$ > "$0"; exec "$@"' "$SWEEP" env RAY_ADDRESS="$HEAD:6379" unlearn sweep "$CONFIG" storage_path="$STORAGE" &
SRUN=$!

STOPPED=""
trap 'STOPPED=yes; PID="$(cat "$SWEEP")"; kill -TERM "${PID:-$SRUN}" || true' TERM
CODE=0
wait "$SRUN" || CODE=$?
while kill -0 "$SRUN" 2> /dev/null; do   # the signal has ended `wait`, not the sweep, which is writing checkpoints
  CODE=0
  wait "$SRUN" || CODE=$?
done
rm -f "$SWEEP"
if [ -n "$STOPPED" ] && [ "$CODE" != 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$CODE"
