#!/bin/bash
# One sweep on whole Slurm nodes.   sbatch cluster-slurm.sh
#SBATCH --job-name=unlearn
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-task=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue
set -euo pipefail

# Python environment and shared file system of your site:
source "$HOME/venv/bin/activate"
STORAGE="${SCRATCH:?a file system that all nodes share}/runs"

# Starts Ray on every node, runs the sweep on the first, stops Ray afterwards (Ray 2.49 or newer).
# A job that is requeued continues: `unlearn sweep` resumes its run folder.
HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
srun ray symmetric-run --address "$HEAD:6379" --min-nodes "$SLURM_NNODES" \
  --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$SLURM_GPUS_PER_TASK" -- \
  env RAY_ADDRESS="$HEAD:6379" unlearn sweep olmo-7b.yaml storage_path="$STORAGE"
