#!/usr/bin/env bash
# Pretrains the course's model, 512 wide with 12 layers, on a billion tokens of OpenWebText: hours on
# one GPU. Run again, it resumes. Flags are those of gptsmith pretrain.
#   course/train_full.sh                here
#   sbatch course/train_full.sh         as a job of Slurm, from the folder that has course/ in it
# Before its time limit, the job saves, queues itself again, and resumes.
#SBATCH --job-name=course-train
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=course-train-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"

data=data/course-full out=runs/course-full
start=(); [ -n "${SLURM_JOB_ID:-}" ] && start=(srun --kill-on-bad-exit=0)
[ -f $data/manifest.json ] ||
    gptsmith prepare openwebtext --tokenizer gpt2 --max-tokens 1000000000 --out $data
resume=(); compgen -G "$out/checkpoints/step-*/manifest.json" >/dev/null && resume=(--resume)
code=0
${start[@]+"${start[@]}"} gptsmith pretrain configs/course-full.yaml --data $data --out $out \
    ${resume[@]+"${resume[@]}"} "$@" || code=$?
[ $code -eq 75 ] && [ -n "${SLURM_JOB_ID:-}" ] && exec scontrol requeue "$SLURM_JOB_ID"
exit $code
