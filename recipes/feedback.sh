#!/usr/bin/env bash
# The embedded task without a label: a simulated user talks to the SFT model, and what they say of its replies
# trains it. Then prompts with constraints, where a stronger model repairs what the user did not like.
#
#   bash recipes/feedback.sh             on one CPU thread: minutes
#
# To use what you have, set any of
#   START    a folder with toy/ (python toy.py) and sft/ (made here otherwise)
#   OUT      where results go (runs/feedback);  SEED;  DTYPE  of matrix products (auto);  PYTHON
# A stage whose results are there is left out.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
seed="${SEED:-0}"
out="${OUT:-runs/feedback}"
start="${START:-$out/start}"
machine="--threads 1 --dtype ${DTYPE:-auto}"
train="--seed $seed --val-fraction 0 --eval-every 100000 --resume $machine"
task="recipes/feedback_task.py --seed $seed"
toy="$start/toy"
stage() { printf '\n== %s\n' "$1"; }
# make FILE COMMAND...: unless the file is there.
make() { local file="$1"; shift; [ -e "$file" ] || "$python" "$@"; }

stage "1/6 the SFT model"
make "$toy/tokenizer.json" toy.py --seed "$seed" --out "$toy"
[ -e "$start/sft/model.safetensors" ] || "$python" sft.py --data "$toy/demonstrations.jsonl" --out "$start/sft" $train

stage "2/6 a user talks to it; what the rules find of what they meant"
make "$out/talks.jsonl" $task --stage talk --model "$start/sft" --data "$toy/prompts.jsonl" --out "$out/talks.jsonl"
"$python" $task --stage measure --data "$out/talks.jsonl"
make "$out/files/summary.json" feedback.py --data "$out/talks.jsonl" --turns 1 --out "$out/files"

stage "3/6 KTO on it"
"$python" kto.py --model "$start/sft" --data "$out/files/labels.jsonl" --steps 150 --batch-tokens 1024 \
    --out "$out/kto" $train
make "$out/kto.json" evaluate.py --models "$start/sft" "$out/kto" --data "$toy/prompts_heldout.jsonl" \
    --judge toy:gold --out "$out/kto.json" $machine

stage "4/6 prompts with constraints, a policy that ignores them, and a stronger one"
kinds="--count 2 --kinds at_most at_least mentions avoids one_sentence --words 4 5 --seed $seed"
for end in "" _heldout; do
    make "$out/constrained$end.jsonl" constraints.py --data "$toy/prompts$end.jsonl" $kinds \
        --out "$out/constrained$end.jsonl"
    make "$out/task$end" $task --stage demonstrations --samples 4 --data "$out/constrained$end.jsonl" --out "$out/task$end"
done
"$python" sft.py --model "$start/sft" --data "$out/task/careless.jsonl" --steps 60 --batch-tokens 1024 --lr 1e-3 \
    --warmup 5 --out "$out/weak" $train
"$python" sft.py --model "$start/sft" --data "$out/task/careful.jsonl" --steps 150 --batch-tokens 2048 --lr 2e-3 \
    --out "$out/strong" $train

stage "5/6 the user talks to the first, the second repairs, the checker verifies"
make "$out/constrained_talks.jsonl" $task --stage talk --questions 1 --model "$out/weak" --data "$out/task/prompts.jsonl" \
    --out "$out/constrained_talks.jsonl"
make "$out/repaired/summary.json" feedback.py --data "$out/constrained_talks.jsonl" --repair "$out/strong" \
    --check constraints:kept --seed "$seed" --out "$out/repaired" $machine

stage "6/6 SFT on what was praised and what was repaired"
"$python" sft.py --model "$out/weak" --data "$out/repaired/sft.jsonl" --epochs 6 --batch-tokens 1024 --lr 1e-3 --warmup 5 \
    --out "$out/student" $train
make "$out/repaired.json" evaluate.py --models "$out/weak" "$out/student" "$out/strong" \
    --data "$out/task_heldout/prompts.jsonl" --judge constraints:kept recipes.feedback_task:gold \
    --out "$out/repaired.json" $machine
