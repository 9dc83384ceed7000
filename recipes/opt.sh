#!/usr/bin/env bash
# The recipe of DeepSpeed-Chat: OPT-1.3B as the policy, OPT-350M as reward model and critic, Dahoas/rm-static split 2:4:4 over
# the three stages, one pass each. Numbers from its scripts (step1 run_1.3b.sh, step2 run_350m.sh, step3 opt/run_1.3b.sh).
#
#   pip install -r requirements-hf.txt && bash recipes/opt.sh                         on one GPU with 80 GB
#   GPUS=8 bash recipes/opt.sh                                                        on eight
#
# POLICY, REWARD: folders or hub names; DATA: what --data takes; OUT: where results go (runs/opt); PYTHON; DTYPE; EXTRA: more flags
# for all stages. OPT's folders on the hub are pickles in part, hence --allow-pickle; only tensors are read from them.
# An interrupted recipe goes on where it stopped.
# Differs from theirs: the SFT stage passes over the data once, not 16 times; batches are counted in tokens; the score isn't
# clipped at 5; rewards come from a reward model that ends at the end token; a reply is sampled at temperature 1, as theirs.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
launch="$python"
[ "${GPUS:-1}" = 1 ] || launch="$python -m torch.distributed.run --nproc_per_node $GPUS"
data="${DATA:-hf:Dahoas/rm-static:train}"
out="${OUT:-runs/opt}"
common="--resume --allow-pickle --dtype ${DTYPE:-auto} ${EXTRA:-}"
length="${LENGTH:-512}"  # tokens of prompt and reply; half of it each in PPO
batch="${BATCH:-32768}"  # tokens per optimiser step
rollouts="${ROLLOUTS:-953}"  # of 32 prompts: one pass over the third part, some 30,500 prompts

stage() { printf '\n== %s\n' "$1"; }
stage "1/3 supervised fine-tuning"
$launch sft.py --model "${POLICY:-facebook/opt-1.3b}" --data "$data" --part 2/4/4:1 --epochs 1 --batch-tokens "$batch" --max-length "$length" \
    --lr 9.65e-6 --weight-decay 0 --warmup 0 --out "$out/sft" $common
stage "2/3 reward model"
$launch reward.py --model "${REWARD:-facebook/opt-350m}" --data "$data" --part 2/4/4:2 --epochs 1 --batch-tokens "$batch" --max-length "$length" \
    --lr 5e-5 --weight-decay 0.1 --warmup 0 --out "$out/reward" $common
stage "3/3 PPO"
$launch ppo.py --model "$out/sft" --reward "$out/reward" --data "$data" --part 2/4/4:3 --steps "$rollouts" --rollout-batch 32 --minibatches 1 \
    --epochs 1 --max-length "$length" --max-new-tokens $((length / 2)) --lr 9.65e-6 --critic-lr 5e-6 --warmup 100 --kl-coef 0.1 --clip 0.2 \
    --value-clip 0.2 --ema 0.992 --out "$out/ppo" $common
