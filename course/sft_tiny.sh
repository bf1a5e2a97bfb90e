#!/usr/bin/env bash
# Tunes the model of train_tiny.sh on gptsmith's built-in conversations: a few minutes on a CPU. Run
# again, it resumes. Flags are those of gptsmith finetune chat:
#   course/sft_tiny.sh --train.steps 2000
set -euo pipefail
cd "$(dirname "$0")/.."

base=runs/course-tiny out=runs/course-tiny-chat
resume=(); compgen -G "$out/checkpoints/step-*/manifest.json" >/dev/null && resume=(--resume)
gptsmith finetune chat --from $base --data skills --out $out --train.steps 1000 \
    --optim.learning-rate 0.01 --eval.interval 250 ${resume[@]+"${resume[@]}"} "$@"
echo "Repeat after me: hello" | gptsmith chat $out
