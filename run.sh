#!/usr/bin/env bash
# bash run.sh [--seed N]           set up, then SFT, reward model, PPO, DPO and evaluation of the toy task in runs/demo
# bash run.sh flywheel [--auto]    set up, then label, train, compare, and again (docs/flywheel.md); --auto: a judge labels
# bash run.sh test [pytest flags]  set up, then the tests
# bash run.sh faults               set up, then kills, full disks, dead ranks, damaged files and bad input: a table of what is survived
# bash run.sh parity               set up .venv-parity, then our numbers against those of transformers and TRL (bench/parity.py)
# bash run.sh bench [flags]        set up .venv-parity, then our speed beside theirs (bench/bench.py; bash run.sh bench --help)
set -euo pipefail
cd "$(dirname "$0")"
usage() { echo "error: $1; usage: bash run.sh [--seed N] | bash run.sh flywheel [--auto] | bash run.sh test [pytest flags] | bash run.sh faults [pytest flags] | bash run.sh parity | bash run.sh bench [flags]" >&2; exit 2; }

command=demo
seed=0
if [ "${1:-}" = test ]; then
    command=test
    shift
elif [ "${1:-}" = faults ]; then
    command=test
    shift
    set -- --faults "$@"
elif [ "${1:-}" = flywheel ]; then
    command=flywheel
    shift
elif [ "${1:-}" = parity ]; then
    command=parity
    [ $# -eq 1 ] || usage "parity takes no arguments"
elif [ "${1:-}" = bench ]; then
    command=bench
    shift
else
    while [ $# -gt 0 ]; do
        case "$1" in
            --seed=*) seed="${1#--seed=}"; shift ;;
            --seed) [ $# -ge 2 ] || usage "--seed needs a number"; seed="$2"; shift 2 ;;
            -h | --help) sed -n '2,7s/^# //p' run.sh; exit 0 ;;
            *) usage "unknown argument $1" ;;
        esac
    done
    [[ "$seed" =~ ^[0-9]+$ ]] || usage "--seed must be a whole number, got $seed"
fi

# OpenMP threads that spin while they wait make a small model 20 times slower on a busy machine; sleeping costs nothing
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
python="${PYTHON:-python3}"
make_venv() {  # folder, oldest Python as "3, 10"
    "$python" -c "import sys; sys.exit(sys.version_info < ($2))" || { echo "error: Python ${2/, /.} or newer is needed; set PYTHON=/path/to/python3" >&2; exit 2; }
    echo "setting up $1 (some minutes: PyTorch is large)"
    "$python" -m venv "$1" || { echo "error: no virtual environment could be made; on Debian: apt install python3-venv" >&2; exit 2; }
}

# -- parity and bench: an environment of their own; `installed`, written last, says that it is complete, and of what
if [ "$command" = parity ] || [ "$command" = bench ]; then
    venv=.venv-parity
    ppo_trl=1.12.0  # the last TRL with PPO; the current one, without it, is in bench/requirements-parity.txt
    wanted="$(cat requirements.txt bench/requirements-parity.txt) trl==$ppo_trl"
    if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ] || ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
        rm -rf "$venv"
        make_venv "$venv" "3, 11"
        "$venv/bin/python" -m pip install --quiet -r bench/requirements-parity.txt
        "$venv/bin/python" -m pip install --quiet --no-deps --target "$venv/trl-$ppo_trl" "trl==$ppo_trl"
        echo "$wanted" >"$venv/installed"
    fi
    [ "$command" = parity ] || exec "$venv/bin/python" bench/bench.py "$@"
    export OMP_NUM_THREADS=1
    "$venv/bin/python" -m pytest -q -p no:cacheprovider tests/test_reward.py::test_bradley_terry_has_the_optimum_of_choix \
        tests/test_label.py::test_agreement_equals_the_peers
    exec "$venv/bin/python" bench/parity.py
fi

# -- set-up: a Python that already has what is needed, else a virtual environment in .venv
if [ "$command" = test ]; then extras="pytest xdist matplotlib transformers tokenizers jinja2 pyarrow"; else extras="matplotlib"; fi
has_all() {
    "$1" - $extras <<'PY' 2>/dev/null
import importlib.util, sys
assert sys.version_info >= (3, 10)
for name in ["torch", "numpy", "tiktoken", "tqdm", "safetensors", *sys.argv[1:]]:
    assert importlib.util.find_spec(name)
import torch
assert tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 6)
PY
}
if ! has_all "$python"; then
    if ! has_all .venv/bin/python; then
        make_venv .venv "3, 10"
        .venv/bin/python -m pip install --quiet -r requirements.txt
        .venv/bin/python -m pip install --quiet ${extras/xdist/pytest-xdist}
    fi
    python=.venv/bin/python
fi

if [ "$command" = flywheel ]; then
    PYTHON="$python" exec bash recipes/flywheel.sh "$@"
fi
if [ "$command" = test ]; then
    case " $* " in
    *" --faults "*) ;;  # one after the other: they wait for processes that they kill, and count what survives
    *) set -- -n auto --maxprocesses 4 --dist loadfile "$@" ;;
    esac
    exec "$python" -m pytest tests "$@"
fi

# -- the demo: an interrupted one goes on where it stopped, a finished or different one is moved aside
demo=runs/demo
settings="seed $seed, code $(cat ./*.py formats/*.py plumbing/*.py | cksum)"
if [ -e "$demo" ] && { [ -e "$demo/summary.json" ] || [ "$(cat "$demo/settings" 2>/dev/null)" != "$settings" ]; }; then
    old="$demo.$(date +%Y%m%d-%H%M%S)"
    mv "$demo" "$old"
    echo "the demo in $demo was moved to $old"
fi
mkdir -p "$demo"
echo "$settings" >"$demo/settings"
before=$(cat "$demo/seconds" 2>/dev/null || echo 0)
SECONDS=0
trap 'echo $((before + SECONDS)) >"$demo/seconds"' EXIT

stage() { printf '\n== %s\n' "$1"; }
common="--seed $seed --resume"
stage "1/7 the embedded task's files"
[ -e $demo/toy/tokenizer.json ] || "$python" toy.py --out $demo/toy --seed "$seed"
demonstrations="--data $demo/toy/demonstrations.jsonl --val-data $demo/toy/demonstrations_heldout.jsonl"
stage "2/7 supervised fine-tuning on mixed demonstrations"
"$python" sft.py $demonstrations --out $demo/sft $common
stage "3/7 asking the SFT model for replies, and an annotator for rankings"
[ -e $demo/preferences/train.jsonl ] || "$python" toy.py --model $demo/sft --out $demo/preferences --seed "$seed"
preferences="--data $demo/preferences/train.jsonl --val-data $demo/preferences/heldout.jsonl"
stage "4/7 reward model"
"$python" reward.py --model $demo/sft $preferences --demonstrations $demo/toy/demonstrations.jsonl --out $demo/reward $common
stage "5/7 PPO"
"$python" ppo.py --model $demo/sft --reward $demo/reward --data $demo/toy/prompts.jsonl --judge toy:gold --out $demo/ppo $common
stage "6/7 DPO"
"$python" dpo.py --model $demo/sft $preferences --out $demo/dpo $common
stage "7/7 evaluation on held-out prompts"
"$python" evaluate.py --models $demo/sft $demo/ppo $demo/dpo --data $demo/toy/prompts_heldout.jsonl --judge toy:gold \
    --out $demo/evaluation.json --seed "$seed"
"$python" report.py --demo $demo --seconds $((before + SECONDS))
