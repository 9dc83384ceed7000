#!/usr/bin/env bash
# The embedded task without a person's label: a judge and a reviser learn six rules, and policies learn from them.
#
#   bash recipes/constitution.sh             a quarter of an hour of one CPU core; what came of it: docs/constitution.md
#   SEED=1 bash recipes/constitution.sh      another seed
#
#   START     a folder with toy/ and sft/ of that seed, as toy.py and sft.py write them; without it they are made
#   JUDGE, REVISER  what constitution.py --feedback takes, in place of those that are trained here
#   OUT       where results go (runs/constitution);  DTYPE  of matrix products (auto);  PYTHON
# An interrupted recipe goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
seed="${SEED:-0}"
out="${OUT:-runs/constitution}"
start="${START:-$out}"
judge="${JUDGE:-$out/judge}"
reviser="${REVISER:-$out/reviser}"
every="--threads 1 --seed $seed --dtype ${DTYPE:-auto}"
trains="$every --resume --eval-every 100000"
taught="--model $start/sft --val-fraction 0.02 --batch-tokens 4096 --lr 2e-3 $trains"
asks="--model $start/sft --data $start/toy/prompts.jsonl --judge toy:gold --principles $out/task/principles.json --n 4 $every --resume"
stage() { printf '\n== %s\n' "$1"; }

stage "1/6 the task, and a model from its demonstrations"
[ -e "$start/toy/tokenizer.json" ] || "$python" toy.py --out "$start/toy" --seed "$seed"
[ -e "$start/sft/model.safetensors" ] || "$python" sft.py --data "$start/toy/demonstrations.jsonl" \
    --val-data "$start/toy/demonstrations_heldout.jsonl" --out "$start/sft" $trains
stage "2/6 a judge and a reviser of that model's size, from six rules"
[ -e "$out/task/principles.json" ] || "$python" recipes/constitution_task.py --seed "$seed" --out "$out/task"
[ -n "${JUDGE:-}" ] || "$python" sft.py --data "$out/task/judge.jsonl" --epochs 3 --out "$judge" $taught
[ -n "${REVISER:-}" ] || "$python" sft.py --data "$out/task/reviser.jsonl" --epochs 2 --out "$reviser" $taught
stage "3/6 critique and revision, and a model from the revisions"
"$python" constitution.py --stage revise --feedback "$reviser" --feedback-temperature 0 --revisions 3 --out "$out/revisions" $asks
"$python" sft.py --model "$start/sft" --data "$out/revisions/sft.jsonl" --val-fraction 0 --epochs 2 --lr 1e-3 --warmup 10 \
    --out "$out/revised" $trains
stage "4/6 the judge's labels, and DPO on them"
"$python" constitution.py --feedback "$judge" --out "$out/labels" $asks
"$python" dpo.py --model "$start/sft" --data "$out/labels/pairs.jsonl" --val-fraction 0 --epochs 3 --out "$out/dpo" $trains
stage "5/6 a reward model from the same labels, and PPO on it"
"$python" reward.py --model "$start/sft" --data "$out/labels/pairs.jsonl" --epochs 2 \
    --demonstrations "$start/toy/demonstrations.jsonl" --out "$out/reward" $trains
"$python" ppo.py --model "$start/sft" --reward "$out/reward" --data "$start/toy/prompts.jsonl" --judge toy:gold \
    --steps 40 --out "$out/ppo" $every --resume
stage "6/6 on held-out prompts, by the judge that knows the truth"
"$python" evaluate.py --models "$start/sft" "$out/revised" "$out/dpo" "$out/ppo" --data "$start/toy/prompts_heldout.jsonl" \
    --judge toy:gold --out "$out/evaluation.json" $every
