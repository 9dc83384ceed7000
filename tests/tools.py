"""What several tests use: runs in subprocesses and in this process, to be watched, killed and broken."""
import atexit
import builtins
import contextlib
import importlib
import inspect
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import aims
import best_of_n
import chat
import constitution
import constraints
import distill
import dpo
import evaluate
import feedback
import grpo
import kto
import label
import ppo
import process
import report
import reward
import rollout as rollout_file
import sft
import sums
import toy
from data import collate, encode_group, endless_batches
from formats.model_folder import load_model
from formats.sources import read_rows
from generate import Generation
from model import GPT
from plumbing import checkpoints, disk, health, run as runtime, steps as steps_file
from plumbing.flags import parse_flags

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"


def toy_files():
    """The folder that `python toy.py` writes, with few preferences.

    One for this process and those that it starts.
    """
    if "TOY_FILES" not in os.environ:
        folder = tempfile.mkdtemp(prefix="toy-")
        with contextlib.redirect_stdout(io.StringIO()):
            toy.write_task(toy.Config(out=folder, groups=300, heldout_groups=40))
        for end in ("", "_heldout"):
            write_steps(Path(folder), end)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["TOY_FILES"] = folder
    return os.environ["TOY_FILES"]


def write_steps(folder, end):
    """Steps of a folder's demonstrations: their words, good, neutral or bad by their length."""
    rows = []
    for line in (folder / f"demonstrations{end}.jsonl").read_text().splitlines()[:200]:
        row = json.loads(line)
        steps = row["completion"].split()
        rows.append({"prompt": row["prompt"], "steps": steps,
                     "labels": [min(len(step) // 3, 2) - 1 for step in steps]})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"steps{end}.jsonl").write_text(text)


TOY = toy_files()
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TINY = "--layers 1 --heads 2 --width 32 --block-size 64"
# Flags of a run of each script that takes a second or two; {root} has sft/ and reward/ from `models`.
PLAN = {
    "sft": f"{TINY} --data {TOY}/demonstrations.jsonl --batch-tokens 512 --eval-every 4 --max-new-tokens 8",
    "reward": "--model {root}/sft --data {root}/preferences.jsonl --batch-tokens 512 --eval-every 4",
    "dpo": "--model {root}/sft --data {root}/preferences.jsonl --batch-tokens 512 --eval-every 4 "
           "--max-new-tokens 8",
    "kto": "--model {root}/sft --data {root}/preferences.jsonl --batch-tokens 512 --eval-every 4 "
           "--max-new-tokens 8",
    "process": f"--data {TOY}/steps.jsonl --step-separator ' ' "
               "--model {root}/sft --batch 16 --eval-every 4",
    "ppo": f"--data {TOY}/prompts.jsonl "
           "--model {root}/sft --reward {root}/reward --rollout-batch 16 --minibatches 2 --max-new-tokens 12",
    "grpo": f"--data {TOY}/prompts.jsonl --model {{root}}/sft --reward {{root}}/reward --rollout-batch 8 "
            "--group 4 --epochs 2 --minibatches 2 --kl-coef 0.05 --overlong keep --max-new-tokens 12",
}
SHORT = "--steps 6 --save-every 1 --micro-batch-tokens 128"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]),
}


def sources():
    """{path from the root: text} of the project's Python files, those in folders with an __init__.py too."""
    rooms = [file.parent for file in ROOT.glob("*/__init__.py") if file.parent.name not in ("bench", "tests")]
    files = [*ROOT.glob("*.py"), *(file for room in rooms for file in room.rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file.read_text("utf-8") for file in sorted(files)}


def split(flags):
    """The words of flags, each of which may be a string of several."""
    return [word for flag in flags for word in shlex.split(str(flag))]


def words(script, root, *flags):
    return split([PLAN[script].format(root=root), "--threads 1", *flags])


def start(script, root, *flags, hook="", launcher=(sys.executable,), **options):
    """Popen of a script's run.

    hook: Python that is executed before the script's main, to break things; {script} is imported by then.
    """
    if hook:
        file = Path(root) / f"hook{abs(hash((script, hook))):x}.py"
        file.write_text(f"import sys; sys.path[:0] = {[str(ROOT), str(TESTS)]}\n"
                        f"from plumbing import run as runtime\n"
                        f"import {script}\n"
                        f"{hook}\n"
                        f"runtime.run_script({script}.main, {script}.Config, '')\n")
    else:
        file = ROOT / f"{script}.py"
    command = [*launcher, str(file), *words(script, root, *flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=ENVIRONMENT, start_new_session=True, **options)


def run(script, root, *flags, timeout=120, code=0, **options):
    """Run to the end; returns what was printed. code: the expected exit code, or None for any."""
    process = start(script, root, *flags, **options)
    try:
        text, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert code is None or process.returncode == code, f"{process.returncode}\n{text}"
    return text


@contextlib.contextmanager
def signal_handlers_kept():
    """What a run does with signals ends with the block."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def exit_code(script, *flags):
    """Run a script in this process, as from the command line; returns its exit code."""
    module = importlib.import_module(script)
    runtime.Run.current = None
    with signal_handlers_kept():
        try:
            runtime.run_script(module.main, module.Config, "", split(flags))
        except SystemExit as ended:
            return ended.code
        finally:
            if runtime.Run.current and runtime.Run.current.lock:
                runtime.Run.current.lock.close()
    return 0


def here(script, root, *flags):
    """Run a script with PLAN's flags in this process; returns its exit code."""
    return exit_code(script, PLAN[script].format(root=root), "--threads 1", *flags)


def run_here(name, *flags):
    """Run a script's main in this process; what it raises comes through."""
    script = importlib.import_module(name)
    try:
        script.main(parse_flags(script.Config, "", split(flags)))
    finally:
        if runtime.Run.current and runtime.Run.current.lock:
            runtime.Run.current.lock.close()  # as the end of a process does


def wait_for(condition, process, seconds=60):
    """Until condition() holds; fails if the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


def rows_of(folder):
    """Rows of metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def metrics(folder):
    """Rows of metrics.jsonl without what depends on the clock."""
    clocked = ("_per_second", "_share")
    rows = rows_of(folder)
    return [{key: value for key, value in row.items() if not key.endswith(clocked)} for row in rows]


def latest(folder):
    """The newest checkpoint of a run."""
    checkpoints = Path(folder) / "checkpoints"
    return checkpoints / json.loads((checkpoints / "latest.json").read_text())["latest"]


def same(one, other):
    """Whether two runs ended in the same bits: weights, training state, metrics."""
    for name in ("model.safetensors", "training.safetensors"):
        if not same_tensors(load_file(latest(one) / name), load_file(latest(other) / name)):
            return False
    states = [json.loads((latest(folder) / "state.json").read_text()) for folder in (one, other)]
    for state in states:
        # The scaler of float32 is empty.
        state["scalers"] = {name: scaler for name, scaler in state["scalers"].items() if scaler}
    compared = ("step", "evaluated", "extra", "scalers")
    return metrics(one) == metrics(other) and all(states[0][key] == states[1][key] for key in compared)


class Killed(BaseException):
    """The end of a run in this process that is cut off as kill -9 would."""


def die():
    raise Killed


# Of a save: (whose function, its name, what its arguments contain, whether just before it).
STAGES = {
    "in the model": (disk, "save_file", "/model.safetensors", False),
    "in the training state": (disk, "save_file", "/training.safetensors", False),
    "before the rename": (os, "rename", "step_", True),
    "before latest.json": (checkpoints, "write_json", "latest.json", True),
    "before the links": (checkpoints.Checkpoints, "link", "step_", True),
    "in the links": (os, "link", "", False),
    "before the deletion": (checkpoints.Checkpoints, "link", "step_", False),
    "in the deletion": (shutil, "rmtree", "/step_", True),
}
PUBLISHED = list(STAGES)[4:]  # those where the new checkpoint counts


def at_stage(stage, step, act, patch=setattr):
    """From now on the save of a step calls act at one of STAGES, with what it writes or deletes half done."""
    owner, name, contained, before = STAGES[stage]
    original = getattr(owner, name)

    def call(*args, **options):
        named = any(contained in str(arg) for arg in args if not isinstance(arg, dict))
        due = runtime.Run.current.step == step and named
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


# -- runs of a few steps on the toy task's files

SCRIPTS = {
    "sft": sft,
    "reward": reward,
    "ppo": ppo,
    "grpo": grpo,
    "dpo": dpo,
    "kto": kto,
    "aims": aims,
    "process": process,
    "best_of_n": best_of_n,
    "constitution": constitution,
    "distill": distill,
    "feedback": feedback,
    "evaluate": evaluate,
    "label": label,
    "chat": chat,
    "toy": toy,
    "sums": sums,
    "constraints": constraints,
    "report": report,
}
TRAINERS = ("sft", "reward", "process", "ppo", "grpo", "dpo", "kto")
# Those whose steps are rollouts: they have no held-out loss.
SAMPLERS = ("ppo", "grpo")
DATA = {
    "sft": f"{TOY}/demonstrations.jsonl",
    "reward": f"{TOY}/preferences.jsonl",
    "dpo": f"{TOY}/preferences.jsonl",
    "kto": f"{TOY}/preferences.jsonl",
    "process": f"{TOY}/steps.jsonl",
    "ppo": f"{TOY}/prompts.jsonl",
    "grpo": f"{TOY}/prompts.jsonl",
    "evaluate": f"{TOY}/prompts_heldout.jsonl",
}
DEMONSTRATIONS = f"--data {TOY}/demonstrations.jsonl"
TINY_RUN = f"{TINY} --threads 1"
QUICK = {
    "sft": "--batch-tokens 512 --eval-every 2",
    "reward": "--batch-tokens 512 --eval-every 2",
    "dpo": "--batch-tokens 512 --eval-every 2",
    "kto": "--batch-tokens 512 --eval-every 2",
    "process": "--step-separator ' ' --batch 16 --eval-every 2",
    "ppo": "--rollout-batch 16 --minibatches 2 --max-new-tokens 12 --sample-every 2",
    "grpo": "--rollout-batch 8 --group 2 --minibatches 2 --max-new-tokens 12 --sample-every 2",
}
WORDS = ("river", "stone", "apple", "window", "garden", "pencil")
ALL_AT_ONCE = "--threads 1 --val-fraction 0 --batch-tokens 100000 --warmup 1"


def command(script, *flags, launcher=(sys.executable,), **options):
    """Run a script in a subprocess; flags may be strings of several words."""
    command = [*launcher, str(ROOT / f"{script}.py"), *split(flags)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=240, **options)


@contextlib.contextmanager
def stopped_in_the_second_step():
    """A run that is asked to stop while it updates its weights for the second time."""
    original = runtime.Run.optimizer_step

    def optimizer_step(self, *args):
        self.stop_signal = signal.SIGTERM if self.step == 1 else None
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(runtime.Run, "optimizer_step", optimizer_step)
        yield
    assert stopped.value.code == 128 + signal.SIGTERM


# -- what is looked at

SILENT = lambda text: None


def write_rows(path, rows):
    """A JSON Lines file, or an array if its name says so."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else lines)
    return path


def dropped(said):
    return dict((reason, int(n)) for n, reason in re.findall(r"dropped (\d+): ([^;]+)", said))


def without(monkeypatch, *packages):
    """Make packages impossible to import."""
    def refuse(name, *args, **kwargs):
        if name.split(".")[0] in packages:
            raise ImportError(name)
        return real(name, *args, **kwargs)
    import importlib
    real = builtins.__import__
    real_module = importlib.import_module
    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(importlib, "import_module", lambda name, *a: refuse(name) and real_module(name, *a))


def recorded(monkeypatch, script, *names):
    """Calls of a script's functions from now on: {name: [(arguments, result)]}."""
    calls = {name: [] for name in names}

    def record(name, original):
        def call(*args, **options):
            calls[name].append((args, original(*args, **options)))
            return calls[name][-1][1]
        return call

    for name in names:
        monkeypatch.setattr(script, name, record(name, getattr(script, name)))
    return calls


def reply_logprob(policy, ids, mask, temperature=1.0):
    """Summed log-probability of the tokens of one reply, mask (T,), from the whole softmax."""
    logprobs = (policy.logits(policy.transformer(ids[None]))[0] / temperature).log_softmax(-1)  # (T, V)
    return sum(logprobs[t - 1, ids[t]] for t in mask.nonzero().flatten().tolist())


def readme_blocks(language):
    """The blocks of code of a language in the README."""
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"```(?:{language})\n(.*?)```", text, re.S)


def readme_commands():
    blocks = "\n".join(readme_blocks("bash|sh")).replace("\\\n", " ")
    return [
        line.split("#")[0].strip()
        for line in blocks.splitlines()
        if re.search(r"\b(python|torchrun|bash)\b", line)
    ]


# -- runs of ppo.py with everything that they compute

MORE_WORDS = (*WORDS, "candle", "bridge")
PPO_RUN = ("--model {root}/sft --data {root}/prompts.json --threads 1 --rollout-batch 16 --minibatches 2 "
           "--max-new-tokens 10 --steps 2 --warmup 1 --lr 0.005 --critic-lr 0.005")
PTX = "--ptx-data {root}/demonstrations.json --ptx-tokens 100"
RECORDED = (
    "generate", "missing_eos_scores", "update_moments", "normalise_scores", "steps_mask", "shaped_rewards",
    "gae", "whiten", "policy_loss", "kl_loss", "value_loss", "adapt_kl_coef", "adapt_penalty", "diagnose",
)


@contextlib.contextmanager
def quietly():
    """Catches what a run says; gives back the signal handlers that it takes."""
    with signal_handlers_kept(), contextlib.redirect_stdout(io.StringIO()) as said:
        yield said


def copied(value):
    """A copy that the run can't change: of tensors, and of tuples, lists and dicts of them."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Generation):
        return Generation(*map(copied, value))
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    return type(value)(map(copied, value)) if type(value) in (tuple, list) else value


def steps_of(run, name):
    return [step for step in run.steps if step.of == name]


def train(root, out, *flags, reward="--reward {root}/reward"):
    """A run of ppo.main with everything it computes.

    rows: its metrics, without timings; said: what it printed; calls[name]: the arguments and results of
    ppo.py's functions, with the numbers of the rollout and the minibatch (from 0); start: weights before
    training; steps: every optimiser step with its network, learning rate, gradient and the weights before and
    after.
    """
    run = SimpleNamespace(calls={name: [] for name in RECORDED}, start={}, steps=[], out=out)
    trained = {}  # optimiser: name and network

    def record(function):
        signature = inspect.signature(function)

        def recorded(*args, **options):
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            call = SimpleNamespace(**copied(bound.arguments),
                                   rollout=len(run.calls["generate"]) - 1,
                                   minibatch=len(steps_of(run, "critic")))
            result = function(*args, **options)
            call.result = copied(result)
            run.calls[function.__name__].append(call)
            return result
        return recorded

    def adamw(network, *args, **options):
        optimizer = steps_file.adamw(network, *args, **options)
        name = "policy" if isinstance(network, GPT) else "critic"
        trained[optimizer], run.start[name] = (name, network), copied(dict(network.state_dict()))
        return optimizer

    def optimizer_step(self, optimizer, lr, max_grad_norm, batch):
        name, network = trained[optimizer]
        gradient = {key: copied(p.grad) for key, p in network.named_parameters()}
        before = copied(dict(network.state_dict()))
        norm = original_step(self, optimizer, lr, max_grad_norm, batch)
        run.steps.append(
            SimpleNamespace(of=name,
                            rollout=len(run.calls["generate"]) - 1,
                            lr=lr,
                            gradient=gradient,
                            before=before,
                            batch=batch,
                            after=copied(dict(network.state_dict()))))
        return norm

    words = " ".join([PPO_RUN, reward, *flags, f"--out {out}"]).format(root=root)
    with quietly() as said, pytest.MonkeyPatch.context() as patch:
        original_step = runtime.Run.optimizer_step
        patch.setattr(runtime.Run, "optimizer_step", optimizer_step)
        patch.setattr(ppo, "adamw", adamw)
        for name in RECORDED:
            owner = {"generate": rollout_file, "diagnose": health}.get(name, ppo)
            patch.setattr(owner, name, record(getattr(owner, name)))
        run_here("ppo", words)
    run.said, run.rows = said.getvalue(), metrics(out) if (out / "metrics.jsonl").exists() else []
    return run


def rollout_of(run, number=0):
    return run.calls["generate"][number].result


def network(kind, folder, weights=None):
    """The network of a checkpoint folder, with other weights if given."""
    found, _ = load_model(folder, kind)
    found.load_state_dict(weights or found.state_dict())
    return found.eval()


def reply_tokens(policy, ids, mask, temperature=1.0):
    """Log-probability and entropy (n,) of the tokens that mask selects, from the whole softmax at once."""
    log_p = (policy.logits(policy.transformer(ids))[:, :-1] / temperature).log_softmax(-1)  # (B, T - 1, V)
    logprobs = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return logprobs[mask[:, 1:]], -(log_p.exp() * log_p).sum(-1)[mask[:, 1:]]


def ptx_logprobs(root, policy, number, budget=100):
    """Log-probabilities (n,) of the reply tokens in the minibatch's batch of demonstrations."""
    _, tokenizer = load_model(root / "sft", GPT)
    examples = [
        encode_group(tokenizer, row)[0]
        for row in read_rows(root / "demonstrations.json", "demonstrations", str)
    ]
    batches = endless_batches([len(ids) for ids, _ in examples], budget, 0)
    batch = next(itertools.islice(batches, number, None))
    ids, mask, _ = collate([examples[i] for i in batch], tokenizer.pad, "cpu")
    return reply_tokens(policy, ids, mask)[0]
