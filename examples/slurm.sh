#!/bin/bash
# A batch run on GPU nodes, a worker per GPU: sbatch examples/slurm.sh --prompts FILE --out DIR --model DIR
# The words after the script's name are options of toprovar batch. docs/pods.md explains every line.
#SBATCH --job-name=toprovar
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=toprovar-%j.log
set -uo pipefail

srun --kill-on-bad-exit=0 --wait=0 --no-kill --label \
    .venv/bin/toprovar batch --backend="${BACKEND:-gpu}" "$@"
status=$?

if ((status != 0 && status != 2 && ${SLURM_RESTART_COUNT:-0} < 100)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
