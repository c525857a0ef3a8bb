#!/bin/bash
# The same with one torchrun per node, for clusters on which srun does not show tasks their GPUs.
# command: sbatch configs/slurm/torchrun.sh configs/kinetics400/base.yaml data.source=/data/k400 out=runs/k400/base
#SBATCH --job-name=video-swinv2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=80
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
export OMP_NUM_THREADS=1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
out=runs/slurm-$SLURM_JOB_ID
for setting in "$@"; do
    case $setting in out=*) out=${setting#out=} ;; esac
done
# torchrun kills its processes 30 s after SIGTERM by default, and always exits with 1. Whether the run wants to be
# restarted is therefore read from the marker file in its folder.
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node 8 --shutdown-timeout 240 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m video_swinv2 train "$@" "out=$out"
code=$?
if [ -e "$out/start-again" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
