#!/usr/bin/env bash
# The embedded task without a person's label: a judge and a reviser learn six rules, and the policy learns from them.
#
#   bash recipes/constitution.sh             a quarter of an hour on one CPU core; results as in docs/constitution.md
#   SEED=1 bash recipes/constitution.sh      another seed
#
#   START   a folder with toy/ and sft/ of that seed, as toy.py and sft.py write them; without it they are made
#   OUT     where results go (runs/constitution);  DTYPE  of matrix products (auto);  PYTHON
# An interrupted recipe goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
seed="${SEED:-0}"
out="${OUT:-runs/constitution}"
start="${START:-$out}"
machine="--threads 1 --seed $seed"
trained="$machine --dtype ${DTYPE:-auto} --resume --eval-every 100000"
asked="--model $start/sft --data $start/toy/prompts.jsonl --judge toy:gold --principles $out/task/principles.json
    $machine --dtype ${DTYPE:-auto} --resume"
taught="--model $start/sft --val-fraction 0.02 --epochs 2 --batch-tokens 4096 --lr 2e-3 $trained"
stage() { printf '\n== %s\n' "$1"; }

stage "1/6 the task, and a model from its demonstrations"
[ -e "$start/toy/tokenizer.json" ] || "$python" toy.py --out "$start/toy" --seed "$seed"
[ -e "$start/sft/model.safetensors" ] || "$python" sft.py --data "$start/toy/demonstrations.jsonl" \
    --val-data "$start/toy/demonstrations_heldout.jsonl" --out "$start/sft" $trained
stage "2/6 a judge and a reviser, of that model's size, from six rules"
[ -e "$out/task/principles.json" ] || "$python" recipes/constitution_task.py --seed "$seed" --out "$out/task"
"$python" sft.py --data "$out/task/judge.jsonl" --out "$out/judge" $taught
"$python" sft.py --data "$out/task/reviser.jsonl" --out "$out/reviser" $taught
stage "3/6 critique and revision, and a model from the revisions"
"$python" constitution.py --stage revise --feedback "$out/reviser" --feedback-temperature 0 --revisions 3 --n 2 \
    --out "$out/revisions" $asked
"$python" sft.py --model "$start/sft" --data "$out/revisions/sft.jsonl" --val-fraction 0 --epochs 4 --lr 1e-3 --warmup 10 \
    --out "$out/revised" $trained
stage "4/6 the judge's labels, and DPO on them"
"$python" constitution.py --feedback "$out/judge" --n 8 --out "$out/labels" $asked
"$python" dpo.py --model "$start/sft" --data "$out/labels/pairs.jsonl" --val-fraction 0 --epochs 2 --out "$out/dpo" $trained
stage "5/6 a reward model from the same labels, and PPO on it"
"$python" reward.py --model "$start/sft" --data "$out/labels/pairs.jsonl" --val-fraction 0.1 --epochs 2 \
    --demonstrations "$start/toy/demonstrations.jsonl" --out "$out/reward" $trained
"$python" ppo.py --model "$start/sft" --reward "$out/reward" --data "$start/toy/prompts.jsonl" --judge toy:gold \
    --steps 60 --out "$out/ppo" $machine --dtype "${DTYPE:-auto}" --resume
stage "6/6 evaluation on held-out prompts, by the judge that knows the truth"
"$python" evaluate.py --models "$start/sft" "$out/revised" "$out/dpo" "$out/ppo" --data "$start/toy/prompts_heldout.jsonl" \
    --judge toy:gold --out "$out/evaluation.json" $machine --dtype "${DTYPE:-auto}"
