#!/usr/bin/env bash
# SmolLM2-135M-Instruct learns to add and subtract from a checker alone: a few demonstrations, then grpo.py.
#
#   bash recipes/reasoning.sh            on 2 CPU cores: about an hour; results as in docs/reasoning.md
#   SIZE=full bash recipes/reasoning.sh  more of everything, for a GPU
#
# pip install -r requirements-hf.txt reasoning-gym. To use what you have, set any of
#   MODEL     a folder or hub name
#   TASK, SETTINGS   a task of reasoning_gym, and what it is made with: "name=value name=value"
#   PROMPTS, HELDOUT, DEMONSTRATIONS, REWARD   instead of a task of reasoning_gym: what grpo.py --data takes, and
#             evaluate.py --data; what sft.py --data takes, or nothing for no fine-tuning first; module:function
#   TOKENS    longest reply
#   OUT       where results go (runs/reasoning);  DTYPE  of matrix products (auto);  PYTHON
# An interrupted recipe goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
model="${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}"
task="${TASK:-chain_sum}"
settings="${SETTINGS:-min_terms=2 max_terms=2 min_digits=1 max_digits=2}"
out="${OUT:-runs/reasoning}"

case "${SIZE:-small}" in
small)
    files="--prompts 2000 --heldout-prompts 200 --demonstrations 256"
    sft="--epochs 2 --batch-tokens 1024 --micro-batch-tokens 8192 --warmup 3 --lr 2e-5"
    grpo="--steps 60 --rollout-batch 16 --group 8 --micro-batch-tokens 8192 --lr 2e-5 --warmup 5 --kl-every 5"
    evaluation="--samples 8 --pass-k 1 8 --micro-batch-tokens 8192" ;;
full)
    files="--prompts 10000 --heldout-prompts 1000 --demonstrations 256"
    sft="--epochs 2 --batch-tokens 1024 --micro-batch-tokens 16384 --warmup 3 --lr 2e-5"
    grpo="--steps 400 --rollout-batch 64 --group 8 --micro-batch-tokens 32768 --lr 2e-5 --warmup 10 --kl-every 5"
    evaluation="--samples 16 --pass-k 1 8 --micro-batch-tokens 32768" ;;
*) echo "error: SIZE must be small or full, got $SIZE" >&2; exit 2 ;;
esac
every="--dtype ${DTYPE:-auto} --resume"
stage() { printf '\n== %s\n' "$1"; }

stage "1/5 questions"
if [ -z "${PROMPTS:-}" ] && [ ! -e "$out/task/prompts.jsonl" ]; then
    "$python" recipes/reasoning_task.py --task "$task" --settings $settings --out "$out/task" --seed 0 $files
fi
prompts="${PROMPTS:-$out/task/prompts.jsonl}"
heldout="${HELDOUT:-$out/task/prompts_heldout.jsonl}"
demonstrations="${DEMONSTRATIONS-$out/task/demonstrations.jsonl}"
reward="${REWARD:-recipes.reasoning_task:score}"
judge="${REWARD:-recipes.reasoning_task:right}"

stage "2/5 the form of an answer, from demonstrations"
start="$model"
if [ -n "$demonstrations" ]; then
    start="$out/sft"
    "$python" sft.py --data "$demonstrations" --model "$model" --out "$start" --val-fraction 0.1 --eval-every 100000 \
        $sft $every
fi
stage "3/5 GRPO with the checker as reward"
"$python" grpo.py --preset dr-grpo --data "$prompts" --model "$start" --reward-fn "$reward" --judge "$judge" \
    --out "$out/grpo" --max-new-tokens "${TOKENS:-12}" --temperature 1 --lr-schedule cosine --kl-coef 0 \
    --flat drop --overlong floor --sample-every 10 --val-fraction 0 $grpo $every
stage "4/5 evaluation on held-out questions: sampled at temperature 1, and the likeliest replies"
models=("$start" "$out/grpo")
measure="--data $heldout --reward-fn $reward --judge $judge --max-new-tokens ${TOKENS:-24} --dtype ${DTYPE:-auto}"
"$python" evaluate.py --models "${models[@]}" $measure $evaluation --temperature 1 --out "$out/evaluation.json"
[ "$start" = "$model" ] || models+=("$model")
"$python" evaluate.py --models "${models[@]}" $measure --temperature 0 --out "$out/greedy.json"
stage "5/5 picture"
"$python" report.py --curves "$out" || echo "no picture: pip install matplotlib"
