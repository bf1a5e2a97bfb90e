#!/usr/bin/env bash
# Tunes the model of train_full.sh on conversations: files, folders or patterns (.jsonl, .parquet ...),
# one argument. They are encoded once, into an Arrow file. Run again, it resumes. Other arguments are
# flags of gptsmith finetune chat.
#   course/sft_full.sh chats.jsonl                here
#   sbatch course/sft_full.sh chats.jsonl         as a job of Slurm, from the folder above course/
# Before its time limit, the job saves, queues itself again, and resumes.
#SBATCH --job-name=course-sft
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=course-sft-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"

chats=${1:?which conversations? course/sft_full.sh chats.jsonl}
shift
base=runs/course-full data=data/course-chats.arrow out=runs/course-full-chat
start=(); [ -n "${SLURM_JOB_ID:-}" ] && start=(srun --kill-on-bad-exit=0)
[ -f $data ] || gptsmith prepare --format chat "$chats" --tokenizer $base --out $data
resume=(); compgen -G "$out/checkpoints/step-*/manifest.json" >/dev/null && resume=(--resume)
code=0
${start[@]+"${start[@]}"} gptsmith finetune chat --from $base --data $data --out $out --train.epochs 3 \
    --train.batch-size 16 ${resume[@]+"${resume[@]}"} "$@" || code=$?
[ $code -eq 75 ] && [ -n "${SLURM_JOB_ID:-}" ] && exec scontrol requeue "$SLURM_JOB_ID"
exit $code
