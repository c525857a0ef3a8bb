#!/bin/bash
# Fine-tuning on several nodes under SLURM, one task per GPU; requeues itself when the time of a job is up.
# command: sbatch configs/slurm/kinetics400.sh configs/kinetics400/base.yaml data.source=/data/k400 out=runs/k400/base
#SBATCH --job-name=video-swinv2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=10
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# cpus-per-task: data.workers plus one for the process itself. signal: five minutes before the end, every task is told
# to save and exit with code 75, which means "start the same command again".
export OMP_NUM_THREADS=1
srun --kill-on-bad-exit=0 --wait=120 video-swinv2 train "$@"
code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
