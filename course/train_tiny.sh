#!/usr/bin/env bash
# Pretrains the course's model in miniature, 32 wide with 2 layers, on the documentation of your own
# Python: a few minutes on a CPU. Run again, it resumes. Flags are those of gptsmith pretrain:
#   course/train_tiny.sh --train.steps 2000
set -euo pipefail
cd "$(dirname "$0")/.."

data=data/course-tiny out=runs/course-tiny
[ -f $data/manifest.json ] || gptsmith prepare pydocs --tokenizer byte --out $data
resume=(); compgen -G "$out/checkpoints/step-*/manifest.json" >/dev/null && resume=(--resume)
gptsmith pretrain configs/course-tiny.yaml --data $data --out $out ${resume[@]+"${resume[@]}"} "$@"
gptsmith generate $out --prompt "The " --max-new-tokens 100
