#!/usr/bin/env bash
# SmolLM2-135M-Instruct aligned on real data: SFT on instructions, a reward model on HH-RLHF, PPO and DPO, evaluation.
#
#   bash recipes/smollm2.sh            on 2 CPU cores: about an hour; results as in docs/smollm2.md
#   SIZE=full bash recipes/smollm2.sh  whole data, longer texts, for a GPU
#
# From the hub by default (pip install -r requirements-hf.txt); to use what you have, set any of
#   MODEL         a folder or hub name
#   INSTRUCTIONS  what sft.py --data takes
#   PREFERENCES   what reward.py --data takes, whose prompts PPO and the evaluation use too
#   OUT           where results go (runs/smollm2);  DTYPE  of matrix products (auto);  PYTHON
# An interrupted recipe goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
model="${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}"
instructions="${INSTRUCTIONS:-hf:tatsu-lab/alpaca:train}"
preferences="${PREFERENCES:-hf:Anthropic/hh-rlhf:train}"
out="${OUT:-runs/smollm2}"

case "${SIZE:-small}" in
small)  # texts of up to 192 tokens, a fraction of an epoch
    common="--max-length 192 --micro-batch-tokens 2048 --val-fraction 0.2"
    sft="--val-fraction 0.1 --steps 40 --batch-tokens 2048 --warmup 4 --lr 2e-5"
    reward="--steps 60 --batch-tokens 2560 --warmup 6 --lr 3e-5"
    dpo="--steps 40 --batch-tokens 2048 --warmup 4 --lr 1e-5"
    # most replies are cut off at 40 tokens: with a penalty for that, PPO would learn to be brief and little else
    ppo="--steps 12 --rollout-batch 32 --minibatches 4 --max-length 136 --max-new-tokens 40 --lr 6e-5 --critic-lr 6e-5 --warmup 1
        --kl-coef 0.01 --lr-schedule constant --missing-eos subtract --missing-eos-penalty 0"
    evaluation="--val-fraction 0.2 --micro-batch-tokens 2048 --prompts 126 --max-length 136 --max-new-tokens 40" ;;
full)
    common="--max-length 1024 --micro-batch-tokens 16384 --val-fraction 0.02"
    sft="--steps 1500 --batch-tokens 32768 --warmup 50 --lr 2e-5"
    reward="--steps 1500 --batch-tokens 32768 --warmup 50 --lr 1e-5"
    dpo="--steps 1500 --batch-tokens 32768 --warmup 50 --lr 2e-6"
    ppo="--steps 300 --rollout-batch 256 --minibatches 4 --max-length 640 --max-new-tokens 128 --lr 3e-6 --critic-lr 1e-5 --warmup 10
        --kl-coef 0.02"
    evaluation="--val-fraction 0.02 --prompts 512 --max-length 640 --max-new-tokens 128" ;;
*) echo "error: SIZE must be small or full, got $SIZE" >&2; exit 2 ;;
esac
every="--dtype ${DTYPE:-auto} --resume --eval-every 100000"

stage() { printf '\n== %s\n' "$1"; }
stage "1/5 supervised fine-tuning on instructions"
"$python" sft.py --data "$instructions" --model "$model" --out "$out/sft" $common $sft $every
stage "2/5 reward model on comparisons"
"$python" reward.py --data "$preferences" --model "$out/sft" --out "$out/reward" $common $reward $every
stage "3/5 DPO on the same comparisons"
"$python" dpo.py --data "$preferences" --model "$out/sft" --out "$out/dpo" --beta 0.1 $common $dpo $every
stage "4/5 PPO on the prompts that are not held out"
"$python" ppo.py --data "$preferences" --model "$out/sft" --reward "$out/reward" --out "$out/ppo" --epochs 2 \
    $common $ppo --dtype "${DTYPE:-auto}" --resume --sample-every 4
stage "5/5 evaluation on held-out prompts: the base model, SFT, PPO, DPO"
"$python" evaluate.py --models "$out/sft" "$model" "$out/ppo" "$out/dpo" --reward "$out/reward" --data "$preferences" \
    $evaluation --dtype "${DTYPE:-auto}" --out "$out/evaluation.json"
"$python" report.py --curves "$out" || echo "no picture: pip install matplotlib"
