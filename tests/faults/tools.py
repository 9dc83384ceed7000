"""Tiny runs in subprocesses, to be killed and broken."""
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent.parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TINY = "--layers 1 --heads 2 --width 32 --block-size 64"
PLAN = {  # flags of a run of each script that takes a second or two; {root} has sft/ and reward/ from `models`
    "sft": f"{TINY} --batch-tokens 512 --eval-every 4 --max-new-tokens 8",
    "reward": "--model {root}/sft --data {root}/preferences.jsonl --batch-tokens 512 --eval-every 4",
    "dpo": "--model {root}/sft --data {root}/preferences.jsonl --batch-tokens 512 --eval-every 4 --max-new-tokens 8",
    "ppo": "--model {root}/sft --reward {root}/reward --rollout-batch 16 --minibatches 2 --max-new-tokens 12"}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}


def words(script, root, *flags):
    return [str(word) for part in (PLAN[script].format(root=root), "--threads 1", *flags) for word in shlex.split(str(part))]


def start(script, root, *flags, hook="", launcher=(sys.executable,), **options):
    """Popen of a script's run. hook: Python that is executed before the script's main, to break things; {script} is imported by then."""
    if hook:
        file = Path(root) / f"hook{abs(hash((script, hook))):x}.py"
        file.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport runtime, {script}\n{hook}\n"
                        f"runtime.run_script({script}.main, {script}.Config, '')\n")
    else:
        file = ROOT / f"{script}.py"
    return subprocess.Popen([*launcher, str(file), *words(script, root, *flags)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env=ENVIRONMENT, start_new_session=True, **options)


def run(script, root, *flags, timeout=120, code=0, **options):
    """Run to the end; returns what was printed. code: the expected exit code, or None for any."""
    process = start(script, root, *flags, **options)
    try:
        text, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert code is None or process.returncode == code, f"{process.returncode}\n{text}"
    return text


def wait_for(condition, process, seconds=60):
    """Until condition() holds; fails if the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


def metrics(folder):
    """Rows of metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(("_per_second", "_share"))}
            for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def latest(folder):
    """The newest checkpoint of a run."""
    checkpoints = Path(folder) / "checkpoints"
    return checkpoints / json.loads((checkpoints / "latest.json").read_text())["latest"]


def same(one, other):
    """Whether two runs ended in the same bits: weights, training state, metrics."""
    files = [load_file(latest(folder) / name) for folder in (one, other) for name in ("model.safetensors", "training.safetensors")]
    states = [json.loads((latest(folder) / "state.json").read_text()) for folder in (one, other)]
    return (all(a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a) for a, b in zip(files[:2], files[2:]))
            and metrics(one) == metrics(other) and all(states[0][k] == states[1][k] for k in ("step", "extra", "scalers")))
