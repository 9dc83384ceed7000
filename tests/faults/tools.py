"""Tiny runs in subprocesses and in this process, to be killed and broken."""
import atexit
import contextlib
import importlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

import toy

from plumbing import run as runtime
from plumbing import checkpoints, disk

ROOT = Path(__file__).resolve().parent.parent.parent


def toy_files():
    """The folder that `python toy.py` writes, with few preferences. One for this process and those that it starts."""
    if "TOY_FILES" not in os.environ:
        folder = tempfile.mkdtemp(prefix="toy-")
        with contextlib.redirect_stdout(io.StringIO()):
            toy.write_task(toy.Config(out=folder, groups=300, heldout_groups=40))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["TOY_FILES"] = folder
    return os.environ["TOY_FILES"]


TOY = toy_files()
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TINY = "--layers 1 --heads 2 --width 32 --block-size 64"
PLAN = {  # flags of a run of each script that takes a second or two; {root} has sft/ and reward/ from `models`
    "sft": f"{TINY} --data {TOY}/demonstrations.jsonl --batch-tokens 512 --eval-every 4 --max-new-tokens 8",
    "reward": "--model {root}/sft --data {root}/preferences.jsonl --batch-tokens 512 --eval-every 4",
    "dpo": "--model {root}/sft --data {root}/preferences.jsonl --batch-tokens 512 --eval-every 4 --max-new-tokens 8",
    "ppo": f"--data {TOY}/prompts.jsonl" " --model {root}/sft --reward {root}/reward --rollout-batch 16 --minibatches 2 --max-new-tokens 12"}
SHORT = "--steps 6 --save-every 1 --micro-batch-tokens 128"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}


def sources():
    """{path from the root: text} of the project's own Python files, those in rooms (folders with an __init__.py) too."""
    rooms = [file.parent for file in ROOT.glob("*/__init__.py") if file.parent.name not in ("bench", "tests")]
    files = [*ROOT.glob("*.py"), *(file for room in rooms for file in room.rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file.read_text("utf-8") for file in sorted(files)}


def words(script, root, *flags):
    return [str(word) for part in (PLAN[script].format(root=root), "--threads 1", *flags) for word in shlex.split(str(part))]


def start(script, root, *flags, hook="", launcher=(sys.executable,), **options):
    """Popen of a script's run. hook: Python that is executed before the script's main, to break things; {script} is imported by then."""
    if hook:
        file = Path(root) / f"hook{abs(hash((script, hook))):x}.py"
        file.write_text(f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests' / 'faults')]}\nfrom plumbing import run as runtime\nimport {script}\n{hook}\n"
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


def here(script, root, *flags):
    """Run a script in this process; returns its exit code."""
    module, kept = importlib.import_module(script), {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    runtime.Run.current = None
    try:
        runtime.run_script(module.main, module.Config, "", words(script, root, *flags))
    except SystemExit as ended:
        return ended.code
    finally:
        if runtime.Run.current and runtime.Run.current.lock:
            runtime.Run.current.lock.close()
        for number, handler in kept.items():
            signal.signal(number, handler)
    return 0


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
    for state in states:
        state["scalers"] = {name: scaler for name, scaler in state["scalers"].items() if scaler}  # that of float32 is empty
    return (all(a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a) for a, b in zip(files[:2], files[2:]))
            and metrics(one) == metrics(other) and all(states[0][k] == states[1][k] for k in ("step", "evaluated", "extra", "scalers")))


class Killed(BaseException):
    """The end of a run in this process that is cut off as kill -9 would."""


def die():
    raise Killed


STAGES = {  # of a save: (whose function, its name, what its arguments contain, whether just before it)
    "in the model": (disk, "save_file", "/model.safetensors", False), "in the training state": (disk, "save_file", "/training.safetensors", False),
    "before the rename": (os, "rename", "step_", True), "before latest.json": (checkpoints, "write_json", "latest.json", True),
    "before the links": (checkpoints.Checkpoints, "link", "step_", True), "in the links": (os, "link", "", False),
    "before the deletion": (checkpoints.Checkpoints, "link", "step_", False), "in the deletion": (shutil, "rmtree", "/step_", True)}
PUBLISHED = list(STAGES)[4:]  # those where the new checkpoint counts


def at_stage(stage, step, act, patch=setattr):
    """From now on, the save of a step calls act at one of STAGES, while what is written or deleted there is half done."""
    owner, name, contained, before = STAGES[stage]
    original = getattr(owner, name)

    def call(*args, **options):
        due = runtime.Run.current.step == step and any(contained in str(arg) for arg in args if not isinstance(arg, dict))
        if due and before:
            if stage == "in the deletion":
                os.unlink(args[0] / "manifest.json")
            act()
        result = original(*args, **options)
        if due and not before:
            if name == "save_file":
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            act()
        return result

    patch(owner, name, call)
