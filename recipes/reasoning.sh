#!/usr/bin/env bash
# SmolLM2-135M-Instruct learns sums and differences from a checker: a few demonstrations, then grpo.py.
#
#   bash recipes/reasoning.sh            on 2 CPU cores: half an hour; results as in docs/reasoning.md
#   SIZE=full bash recipes/reasoning.sh  more of everything, for a GPU
#
# pip install -r requirements-hf.txt reasoning-gym; to use what you have, set any of
#   MODEL            a folder or hub name
#   TASK, SETTINGS   a task of reasoning_gym, and what it is made with ("name=value name=value")
#   PROMPTS, HELDOUT, REWARD   questions of your own instead: what grpo.py --data takes, what evaluate.py --data
#                    takes, and the checker, module:function
#   DEMONSTRATIONS   for those: what sft.py --data takes; without it there is no fine-tuning first
#   TOKENS, LR       longest reply, and learning rate of grpo.py
#   OUT              where results go (runs/reasoning);  DTYPE  of matrix products (auto);  PYTHON
# An interrupted recipe goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
model="${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}"
task="${TASK:-chain_sum}"
settings="${SETTINGS:-}"
[ -n "${TASK:-}${SETTINGS:-}" ] || settings="min_terms=2 max_terms=2 min_digits=1 max_digits=2"
out="${OUT:-runs/reasoning}"

case "${SIZE:-small}" in
small)
    files="--prompts 2000 --heldout-prompts 200 --demonstrations 256"
    sft="--epochs 2 --batch-tokens 1024 --micro-batch-tokens 8192 --warmup 3 --lr 2e-5"
    grpo="--steps 60 --rollout-batch 16 --group 8 --micro-batch-tokens 8192 --warmup 5 --kl-every 5"
    evaluation="--samples 8 --pass-k 1 8 --micro-batch-tokens 8192" ;;
full)
    files="--prompts 10000 --heldout-prompts 1000 --demonstrations 256"
    sft="--epochs 2 --batch-tokens 1024 --micro-batch-tokens 16384 --warmup 3 --lr 2e-5"
    grpo="--steps 400 --rollout-batch 64 --group 8 --micro-batch-tokens 32768 --warmup 10 --kl-every 5"
    evaluation="--samples 16 --pass-k 1 8 --micro-batch-tokens 32768" ;;
*) echo "error: SIZE must be small or full, got $SIZE" >&2; exit 2 ;;
esac
every="--dtype ${DTYPE:-auto} --resume"
stage() { printf '\n== %s\n' "$1"; }

stage "1/5 questions"
if [ -n "${PROMPTS:-}" ]; then
    prompts="$PROMPTS"
    heldout="${HELDOUT:?PROMPTS needs HELDOUT, other questions to measure on}"
    reward="${REWARD:?PROMPTS needs REWARD, module:function}"
    judge="$reward"
    demonstrations="${DEMONSTRATIONS:-}"
else
    prompts="$out/task/prompts.jsonl"
    heldout="$out/task/prompts_heldout.jsonl"
    # What is trained on may be a part of 1 (some letters of a word); what is measured is whether all is right.
    reward=recipes.reasoning_task:score
    judge=recipes.reasoning_task:right
    demonstrations="$out/task/demonstrations.jsonl"
    [ -e "$prompts" ] || "$python" recipes/reasoning_task.py --task "$task" ${settings:+--settings $settings} \
        --seed 0 $files --out "$out/task"
fi

stage "2/5 the form of an answer, from demonstrations"
start="$model"
if [ -n "$demonstrations" ]; then
    start="$out/sft"
    "$python" sft.py --data "$demonstrations" --model "$model" --out "$start" --val-fraction 0.1 --eval-every 100000 \
        $sft $every
fi
stage "3/5 GRPO with the checker as reward"
"$python" grpo.py --preset dr-grpo --data "$prompts" --model "$start" --reward-fn "$reward" --judge "$judge" \
    --out "$out/grpo" --max-new-tokens "${TOKENS:-12}" --temperature 1 --lr "${LR:-2e-5}" --lr-schedule cosine --kl-coef 0 \
    --flat drop --overlong floor --sample-every 10 --val-fraction 0 $grpo $every
stage "4/5 evaluation on held-out questions: sampled at temperature 1, and the likeliest replies"
models=("$start" "$out/grpo")
measure="--data $heldout --reward-fn $reward --judge $judge --max-new-tokens ${TOKENS:-24} --dtype ${DTYPE:-auto}"
"$python" evaluate.py --models "${models[@]}" $measure $evaluation --temperature 1 --out "$out/evaluation.json"
[ "$start" = "$model" ] || models+=("$model")
"$python" evaluate.py --models "${models[@]}" $measure --temperature 0 --out "$out/greedy.json"
stage "5/5 picture"
"$python" report.py --curves "$out" || echo "no picture: pip install matplotlib"
