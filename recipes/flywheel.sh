#!/usr/bin/env bash
# The flywheel: a policy answers, somebody says which replies are better, a reward model and the policy learn from
# all that was said so far, and again. docs/flywheel.md walks through it.
#
#   bash recipes/flywheel.sh                you label, on a page that opens
#   bash recipes/flywheel.sh --auto         the embedded task's judge labels
#
# To use what you have, set any of
#   START    a folder with toy/ and sft/ of the demo (runs/demo); made in OUT if it is not there
#   OUT      where results go (runs/flywheel);  ROUNDS (5; 1 by hand);  LABELS  comparisons a round (300; 50 by hand)
#   SEED;  DTYPE  of matrix products (auto);  PYTHON
# An interrupted recipe goes on where it stopped. With more ROUNDS it goes on from those that are there.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
auto=""
case "${1:-}" in
    "") ;;
    --auto) auto=yes ;;
    *) echo "error: unknown argument $1; usage: bash recipes/flywheel.sh [--auto]" >&2; exit 2 ;;
esac
seed="${SEED:-0}"
out="${OUT:-runs/flywheel}"
start="${START:-runs/demo}"
[ -e "$start/sft/model.safetensors" ] || start="$out/start"
rounds="${ROUNDS:-${auto:+5}}"
rounds="${rounds:-1}"
labels="${LABELS:-${auto:+300}}"
labels="${labels:-50}"
every="--threads 1 --dtype ${DTYPE:-auto}"
votes_by="${auto:+--by toy:gold}"
votes_by="${votes_by:---until-done}"
trains="$every --seed $seed --resume"
stage() { printf '\n== %s\n' "$1"; }

if [ ! -e "$start/sft/model.safetensors" ]; then
    stage "the policy to begin with, from demonstrations"
    [ -e "$start/toy/tokenizer.json" ] || "$python" toy.py --seed "$seed" --out "$start/toy"
    "$python" sft.py --data "$start/toy/demonstrations.jsonl" --val-data "$start/toy/demonstrations_heldout.jsonl" \
        --out "$start/sft" $trains
fi
policy="$start/sft"
votes=""
for round in $(seq "$rounds"); do
    here="$out/round_$round"
    mkdir -p "$here"
    if [ ! -e "$here/labels/preferences.jsonl" ]; then
        stage "round $round: $labels comparisons of two replies by $policy"
        # By its seed every round asks about other prompts.
        asks="--models $policy --data $start/toy/prompts.jsonl --n 2 --limit $labels --seed $((seed * 100 + round))"
        "$python" label.py $asks --points 5 --out "$here/labels" $every $votes_by
        "$python" label.py --out "$here/labels" --summary --export
    fi
    votes="${votes:+$votes,}$here/labels/preferences.jsonl"
    stage "round $round: a reward model and a policy from all votes so far"
    "$python" reward.py --model "$start/sft" --data "$votes" --val-fraction 0.1 --epochs 3 --lr 1e-3 --batch-tokens 1024 \
        --warmup 10 --ties soft --demonstrations "$start/toy/demonstrations.jsonl" --eval-every 100000 \
        --out "$here/reward" $trains
    "$python" ppo.py --model "$start/sft" --reward "$here/reward" --data "$start/toy/prompts.jsonl" --judge toy:gold \
        --kl-coef 0.5 --steps 20 --out "$here/policy" $trains
    policy="$here/policy"
    [ -e "$here/evaluation.json" ] || "$python" evaluate.py --models "$start/sft" "$policy" \
        --data "$start/toy/prompts_heldout.jsonl" --judge toy:gold --out "$here/evaluation.json" $every --seed "$seed"
    "$python" recipes/flywheel_figure.py --out "$out"
done
