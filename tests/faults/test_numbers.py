"""Numbers that are none, gradients that explode, no memory, no network, no GPU: what a run does then, and
that nothing bad gets into the weights."""
import functools
import json
import math
import re
import signal
import socket
import sys
from types import SimpleNamespace

import pytest
import tiktoken
import torch
from safetensors.torch import load_file

from plumbing import flags
import generate
import model
import judges
import rollout
from plumbing import run as runtime
from plumbing import checkpoints
import tools
from tools import SAMPLERS, TOY, TRAINERS, same_tensors
import toy

# Those that differ least run with --faults alone.
LONG = [pytest.param(script, marks=pytest.mark.long) for script in ("reward", "grpo", "dpo", "kto")]
FEW = ["sft", "ppo", *LONG]
OPTIMIZER = {name: "policy_optimizer" if name == "ppo" else "optimizer" for name in TRAINERS}
ROWS = {"sft": "--data {root}/preferences.jsonl " f"--tokenizer {TOY}"}


def here(script, root, *words):
    """Run a script in this process, sft on few rows; returns its exit code."""
    return tools.here(script, root, ROWS.get(script, "").format(root=root), *words)


def wrap(monkeypatch, owner, name, around):
    """Have owner.name(*args) be around(original, *args)."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: around(original, *args, **options))


def state_of(run):
    return {
        name: tensor.clone()
        for name, tensor in checkpoints.training_state(run.modules, run.optimizers).items()
    }


def skipped(folder):
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def finite_checkpoints(folder):
    """Names of a run's checkpoints, which are whole, finite and complete."""
    found = sorted(path for path in (folder / "checkpoints").iterdir() if path.is_dir())
    for checkpoint in found:
        assert checkpoints.find_damage(checkpoint) == ""
        assert all(tensor.isfinite().all() for file in checkpoint.glob("*.safetensors")
                   for tensor in load_file(file).values())
    return [path.name for path in found]


def warnings(text):
    """The lines of warning, but for what a reward model of five steps is told at its end."""
    lines = [line for line in text.splitlines() if line.startswith("warning: ")]
    return [line for line in lines if not line.startswith("warning: this reward model")]


def last_line(captured):
    """The one line of an error that was printed."""
    assert "Traceback" not in captured.err and captured.err.count("error: ") == 1, captured.err
    return captured.err.strip().splitlines()[-1]


# -- numbers that are not finite

@pytest.mark.case(15)
@pytest.mark.parametrize("script", TRAINERS)
def test_a_batch_whose_loss_is_infinite_changes_nothing_is_reported_and_training_goes_on(
        script, root, tmp_path, monkeypatch, capsys):
    batches, states = [], []

    def backward(original, run, loss, optimizer):
        first = run.step == 2 and not states and optimizer is run.optimizers[OPTIMIZER[script]]
        original(run, loss * math.inf if first else loss, optimizer)

    def optimizer_step(original, run, optimizer, lr, limit, batch):
        if run.step != 2 or optimizer is not run.optimizers[OPTIMIZER[script]] or states:
            return original(run, optimizer, lr, limit, batch)
        states.append(state_of(run))
        norm = original(run, optimizer, lr, limit, batch)
        states.append(state_of(run))
        batches.append(list(batch))
        assert not norm.isfinite()
        return norm

    wrap(monkeypatch, runtime.Run, "backward", backward)
    wrap(monkeypatch, runtime.Run, "optimizer_step", optimizer_step)
    assert here(script, root, f"--out {tmp_path}/run --steps 5") == 0
    assert same_tensors(*states) and len(batches) == 1
    row, = skipped(tmp_path / "run")
    assert row["step"] == 3
    assert row["examples"] == batches[0]
    assert re.fullmatch(r"the gradient of \w+\.transformer\.\S+ is not finite", row["why"])
    warning, = warnings(capsys.readouterr().out)
    assert row["why"] in warning
    assert "step 3" in warning
    assert str(batches[0][0]) in warning
    assert "skipped.jsonl" in warning
    rows = [row for row in tools.metrics(tmp_path / "run") if "lr" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert script in SAMPLERS or "grad_norm" not in rows[2]
    assert finite_checkpoints(tmp_path / "run") == ["step_000005"]
    assert not same_tensors(states[1], state_of(runtime.Run.current))


def spoil(monkeypatch, step, part):
    """After so many steps a weight becomes NaN."""
    def optimizer_step(original, run, *args):
        norm = original(run, *args)
        if run.step + 1 == step:
            with torch.no_grad():
                dict(next(iter(run.modules.values())).named_parameters())[part].view(-1)[3] = math.nan
        return norm

    wrap(monkeypatch, runtime.Run, "optimizer_step", optimizer_step)


WEIGHT = "transformer.h.0.mlp.c_fc.weight"


@pytest.mark.case(15)
@pytest.mark.parametrize("script", FEW)
def test_a_weight_that_is_nan_is_named_ends_the_run_and_is_never_saved(script, root, tmp_path, monkeypatch,
                                                                       capsys):
    whole = f"--out {tmp_path}/whole --steps 6 --save-every 2"
    assert here(script, root, whole) == 0
    with monkeypatch.context() as patch:
        spoil(patch, 3, WEIGHT)
        assert here(script, root, f"--out {tmp_path}/run --steps 6 --save-every 2") == 1
        captured = capsys.readouterr()
        owner = "reward" if script == "reward" else "policy"
        assert f"{WEIGHT} is not finite" in last_line(captured)
        assert f"the weight {owner}.{WEIGHT} is not finite" in warnings(captured.out)[-1]
        assert finite_checkpoints(tmp_path / "run") == ["step_000002"]
    assert here(script, root, f"--out {tmp_path}/run --steps 6 --save-every 2 --resume") == 0
    assert tools.same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.case(15)
@pytest.mark.parametrize("script, batches", [("sft", 1), ("dpo", 1), ("kto", 1), ("ppo", 4), ("grpo", 4)])
def test_the_run_ends_after_as_many_skipped_batches_as_it_was_told(script, batches, root, tmp_path,
                                                                   monkeypatch, capsys):
    spoil(monkeypatch, 2, WEIGHT)
    assert here(script, root, f"--out {tmp_path}/run --steps 9 --max-skipped 3",
                "" if script in SAMPLERS else "--eval-every 100") == 1
    line, rows = last_line(capsys.readouterr()), skipped(tmp_path / "run")
    assert re.search(rf"the weight policy\.{WEIGHT} is not finite, and more than --max-skipped 3 batches",
                     line)
    assert len(rows) >= 4 and all(row["examples"] and "policy." in row["why"] for row in rows)
    assert rows[0]["step"] == (2 if script in SAMPLERS else 3)
    assert rows[-1]["step"] == (3 if script in SAMPLERS else 6)
    assert not finite_checkpoints(tmp_path / "run") and not (tmp_path / "run" / "model.safetensors").exists()


def flawed(bad, monkeypatch):
    """A reward function that gives NaN to the second reply of some rollouts, number 0 being the trial; the
    prompts that it saw."""
    seen = []

    def score(prompts, replies):
        seen.append(prompts)
        return [
            math.nan if len(seen) - 1 in bad and i == 1 else float(len(reply))
            for i, reply in enumerate(replies)
        ]

    monkeypatch.setitem(sys.modules, "flawed", SimpleNamespace(score=score))
    return seen


@pytest.mark.case(15)
@pytest.mark.parametrize("source", ["function", "model"])
def test_one_reward_that_is_nan_costs_its_rollout_alone_and_is_named(source, root, tmp_path, monkeypatch,
                                                                     capsys):
    seen = flawed({3} if source == "function" else set(), monkeypatch)
    states = {}
    original = judges.last_scores

    def last_scores(model, ids, lengths, mask):
        scores = original(model, ids, lengths, mask)
        if runtime.Run.current.step == 2 and source == "model":
            scores[lengths.argmin()] = math.nan
        return scores

    monkeypatch.setattr(judges, "last_scores", last_scores)
    wrap(monkeypatch, runtime.Run, "safe_point", lambda original, run:
         (states.setdefault(run.step, state_of(run)), original(run)) and None)
    assert here("ppo", root,
                f"--out {tmp_path}/run --steps 5 --reward-fn flawed:score --critic-init reward") == 0
    assert same_tensors(states[2], states[3])
    assert not same_tensors(states[1], states[2])
    assert not same_tensors(states[3], states[4])
    row, = skipped(tmp_path / "run")
    warning, = warnings(capsys.readouterr().out)
    assert row["step"] == 3
    assert row["why"] == "the score is not finite"
    assert "step 3: the score is not finite" in warning
    assert len(row["examples"]) == 1
    if source == "function":
        assert toy.World(0).prompts("train")[row["examples"][0]].text == seen[3][1]
    assert [row["step"] for row in tools.metrics(tmp_path / "run")] == [1, 2, 4, 5]


@pytest.mark.case(15)
def test_rewards_that_are_always_nan_end_the_run_with_what_was_good_saved(root, tmp_path, monkeypatch,
                                                                          capsys):
    flawed(range(3, 100), monkeypatch)
    assert here("ppo", root, f"--out {tmp_path}/run --steps 9 --reward-fn flawed:score --max-skipped 2") == 1
    assert "the score is not finite, and more than --max-skipped 2 batches" in last_line(capsys.readouterr())
    assert [row["step"] for row in skipped(tmp_path / "run")] == [3, 4, 5]
    assert finite_checkpoints(tmp_path / "run") == ["step_000005"]
    assert tools.metrics(tmp_path / "run")[-1]["step"] == 2


@pytest.mark.case(15)
def test_a_rollout_that_is_skipped_leaves_nothing_behind_that_resuming_would_lack(
        root, tmp_path, monkeypatch):
    """PPO-ptx draws its batches by the number of the step, as everything else does."""
    ptx = f"--ptx-coef 0.5 --ptx-data {TOY}/demonstrations.jsonl --ptx-tokens 128"
    words = f"--reward-fn flawed:score --steps 4 {ptx}"
    flawed({2}, monkeypatch)  # rollout 2
    assert here("ppo", root, words, f"--out {tmp_path}/whole") == 0
    flawed({2}, monkeypatch)

    def optimizer_step(original, run, *args):
        run.stop_signal = signal.SIGTERM if run.step == 2 else None
        return original(run, *args)

    with monkeypatch.context() as patch:
        wrap(patch, runtime.Run, "optimizer_step", optimizer_step)
        assert here("ppo", root, words, f"--out {tmp_path}/run") == 143
    flawed(set(), monkeypatch)
    assert here("ppo", root, words, f"--out {tmp_path}/run --resume") == 0
    assert tools.same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.case(15)
def test_sampling_from_logits_that_are_nan_gives_tokens_of_the_vocabulary():
    for width in (5, 256, 300):
        token = generate.sample_token(torch.full((3, width), math.nan), 1.0, 0, 1.0,
                                      torch.rand(3, 2, dtype=torch.float64))
        assert ((0 <= token) & (token < width)).all()


# -- gradients that explode

def multiply_gradients(monkeypatch, factors):
    wrap(monkeypatch, runtime.Run, "backward",
         lambda original, run, loss, optimizer: original(run, loss * factors.get(run.step, 1.0), optimizer))


@pytest.mark.case(16)
@pytest.mark.parametrize("script", FEW)
def test_gradients_of_ten_thousand_times_the_size_are_clipped_to_the_same_step_and_logged(
        script, root, tmp_path, monkeypatch):
    words = "--steps 5 --max-grad-norm 0.01"
    assert here(script, root, words, f"--out {tmp_path}/calm") == 0
    multiply_gradients(monkeypatch, {2: 1e4})
    assert here(script, root, words, f"--out {tmp_path}/wild") == 0
    for calm, wild in zip(*(tools.metrics(tmp_path / name) for name in ("calm", "wild"))):
        norms = {
            key: (calm.pop(key), wild.pop(key))
            for key in [key for key in calm if key.endswith("grad_norm")]
        }
        for before, after in norms.values():
            assert before > 0.01
            assert after == pytest.approx(before * (1e4 if calm["step"] == 3 else 1), rel=1e-3)
        if calm["step"] == 3:  # the losses of this batch were multiplied, too
            calm = {key: value for key, value in calm.items() if "loss" not in key}
            wild = {key: value for key, value in wild.items() if "loss" not in key}
        assert wild == pytest.approx(calm, rel=1e-3, abs=1e-4)
    assert not (tmp_path / "wild" / "skipped.jsonl").exists()


@pytest.mark.case(16)
@pytest.mark.parametrize("script, first", [("sft", 20), ("ppo", 5)])
def test_spikes_of_the_gradient_norm_are_skipped_if_asked_for_each_optimizer_by_its_own_norms(
        script, first, root, tmp_path, monkeypatch, capsys):
    words = "--steps 26 --eval-every 100 --lr 1e-5"
    if script == "ppo":
        # A rollout has four steps of each optimiser.
        words = "--steps 8 --lr 1e-5 --critic-lr 1e-5"
    spikes, states = dict.fromkeys(range(first, first + 4), 30.0), {}
    wrap(monkeypatch, runtime.Run, "safe_point", lambda original, run:
         (states.setdefault(run.step, state_of(run)), original(run)) and None)
    multiply_gradients(monkeypatch, spikes)
    assert here(script, root, words, f"--out {tmp_path}/off --max-skipped 0") == 0
    assert not (tmp_path / "off" / "skipped.jsonl").exists()
    assert not same_tensors(states[first], states[first + 1])
    states.clear()
    capsys.readouterr()
    if script == "sft":
        multiply_gradients(monkeypatch, {24: math.inf})  # which counts for --max-skipped
    assert here(script, root, words, f"--out {tmp_path}/on --skip-sigma 6 --max-skipped 1") == 0
    assert all(same_tensors(states[first], states[step]) for step in states if step >= first and step < 26)
    rows, said = skipped(tmp_path / "on"), warnings(capsys.readouterr().out)
    why = ["deviations above" in row["why"] for row in rows]
    assert why == ([True] * 4 + [False] if script == "sft" else [True] * 24)
    assert {row["step"] for row in rows} == set(range(first + 1, first + 6 if script == "sft" else 9))
    assert len(rows) == len(said) and f"Skipped so far: {len(rows)}" in said[-1]


@pytest.mark.case(16)
@pytest.mark.parametrize("script", FEW)
def test_a_learning_rate_of_a_thousand_ends_in_a_clear_line_and_saves_nothing_that_is_not_finite(
        script, root, tmp_path, capsys):
    # Weights grow a hundredfold with each step.
    words = {"ppo": "--critic-lr 1e3", "grpo": ""}.get(script, "--weight-decay 0.1")
    assert here(script, root,
                f"--out {tmp_path}/run --steps 40 --save-every 4 --lr 1e3 --warmup 1 --max-grad-norm 1e9",
                words) == 1
    line = last_line(capsys.readouterr())
    assert "is not finite" in line and "lower the learning rate" in line
    assert len(finite_checkpoints(tmp_path / "run")) <= 4
    assert not list((tmp_path / "run" / "checkpoints").glob(".writing*"))
    assert all(math.isfinite(value) for row in tools.metrics(tmp_path / "run") for value in row.values())


@pytest.mark.case(17)
def test_ppo_warns_of_a_kl_that_blows_up_and_ends_with_all_saved_if_asked_to(root, tmp_path, capsys):
    words = "--steps 6 --lr 0.3 --warmup 1"
    assert here("ppo", root, words, f"--out {tmp_path}/warned --kl-limit 1e9") == 0
    assert not warnings(capsys.readouterr().out)
    rows = tools.metrics(tmp_path / "warned")
    limit = 0.8 * rows[1]["kl"]  # between those of the first two steps
    words += f" --kl-limit {limit}"
    assert rows[0]["kl"] < limit and len(rows) == 6
    assert here("ppo", root, words, f"--out {tmp_path}/warned --overwrite") == 0
    assert re.match(rf"warning: step 2: the KL .* is beyond --kl-limit {limit:g}: raise --kl-coef",
                    warnings(capsys.readouterr().out)[0])
    assert tools.metrics(tmp_path / "warned") == rows
    assert here("ppo", root, words, f"--out {tmp_path}/run --kl-limit-stop") == 1
    assert re.match(
        rf"error: step 2: the KL per reply, .* is beyond --kl-limit {limit:g}, and "
        rf"--kl-limit-stop was asked for",
        last_line(capsys.readouterr()))
    assert finite_checkpoints(tmp_path / "run") == ["step_000002"]
    assert tools.metrics(tmp_path / "run") == rows[:2]
    # It goes on if told to.
    assert here("ppo", root, words,
                f"--out {tmp_path}/run --kl-limit-stop --resume --override --kl-limit 1e9") == 0
    assert tools.metrics(tmp_path / "run") == rows and tools.same(tmp_path / "run", tmp_path / "warned")


# -- out of memory

@pytest.mark.case(29)
@pytest.mark.parametrize("script, owner", [
    ("sft", model.GPT),
    ("reward", model.ScalarModel),
    pytest.param("dpo", model.GPT, marks=pytest.mark.long),
    pytest.param("kto", model.GPT, marks=pytest.mark.long),
    ("ppo", None),
])
def test_no_memory_is_one_line_that_says_where_and_which_flags_help_and_the_run_can_go_on(
        script, owner, root, tmp_path, monkeypatch, capsys):
    words = f"--out {tmp_path}/run --steps 4 --save-every 2 --micro-batch-tokens 100"
    if script != "ppo":
        words += " --eval-every 100"
    error = torch.OutOfMemoryError("CUDA out of memory")
    if script in ("sft", "ppo"):
        error = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    calls = []

    def forward(original, *args, **options):
        if runtime.Run.current.step == 2 and runtime.Run.current.clean:
            calls.append(args)
            if owner is None or len(calls) == 2:
                raise error
        return original(*args, **options)

    with monkeypatch.context() as patch:
        wrap(patch, *((rollout, "generate") if owner is None else (owner, "forward")), forward)
        assert here(script, root, words) == 1
    where = "sampling 16 replies at once" if owner is None else r"pass 2 of \d+ \(of \d+ examples\)"
    advice = r"lower --micro-batch-tokens \(now 100\), "
    if script == "ppo":
        advice += r"bound --rollout-rows \(now 0\), "
    advice += "add --checkpoint-activations, "
    assert re.fullmatch(rf"error: out of memory in step 3, {where}; {advice}.*--lora-rank.*",
                        last_line(capsys.readouterr()))
    assert finite_checkpoints(tmp_path / "run") == ["step_000002"]
    assert here(script, root, words, "--resume") == 0


@pytest.mark.case(29)
@pytest.mark.long
def test_a_process_that_may_have_no_more_memory_says_so(root, tmp_path):
    hook = """
import resource
begin = runtime.Run.begin
def limited(self, *args, **options):
    begun = begin(self, *args, **options)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, -1))
    return begun
runtime.Run.begin = limited
"""
    words = "--steps 4 --batch-tokens 1000000 --micro-batch-tokens 1000000 --eval-every 100"
    said = tools.run("sft", root, f"--out {tmp_path}/run", words, hook=hook, code=1)
    expected = (r"^error: out of memory in step \d, pass 1 of 1 \(of \d+ examples\); "
                r"lower --micro-batch-tokens \(now 1000000\)")
    assert re.search(expected, said, re.M)
    assert "Traceback" not in said


# -- no network, no cache, no GPU

@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No network, and no tokenizer that was fetched before; returns the attempts."""
    attempts = []

    def deny(*args, **options):
        attempts.append(args)
        raise OSError(101, "Network is unreachable")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, deny)
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, deny)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    return attempts


@pytest.mark.case(28)
@pytest.mark.parametrize("script", [*TRAINERS, "evaluate", pytest.param("toy", marks=pytest.mark.long)])
def test_nothing_asks_the_network_by_default(script, root, tmp_path, monkeypatch, alone):
    monkeypatch.delitem(ROWS, "sft")
    words = {
        "toy": f"--model {root}/sft --groups 20 --heldout-groups 4 --samples 1 --max-new-tokens 8",
        "evaluate": f"--models {root}/sft --prompts 4 --max-new-tokens 8 --data {TOY}/prompts_heldout.jsonl "
                    f"--judge toy:gold",
    }
    monkeypatch.setattr(tools, "PLAN", tools.PLAN | words)
    out = f"{tmp_path}/results.json" if script == "evaluate" else f"{tmp_path}/run"
    assert here(script, root, f"--out {out}", "--steps 1" if script in TRAINERS else "") == 0 and not alone


@pytest.mark.case(28)
@pytest.mark.parametrize("words, said", [
    ("--tokenizer gpt2", "the gpt2 tokenizer is not in tiktoken's cache and could not be fetched"),
    ("--data {tmp}/rows.json", "the gpt2 tokenizer is not in tiktoken's cache and could not be fetched"),
    ("--model gpt2-org/gpt2-tiny", "gpt2-org/gpt2-tiny"),
    (f"--data hf:somebody/something:train --tokenizer {TOY}", "hf:somebody/something"),
])
def test_without_network_and_cache_what_needs_them_ends_in_one_line(words, said, root, tmp_path, monkeypatch,
                                                                    capsys, alone):
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "Say hello.", "response": "Hello!"}] * 20))
    monkeypatch.setattr(tools, "PLAN", {"sft": "--data {root}/preferences.jsonl"})
    monkeypatch.delitem(ROWS, "sft")
    assert here("sft", root, words.format(tmp=tmp_path), f"--out {tmp_path}/run --steps 1") == 2
    captured = capsys.readouterr()
    assert said in last_line(captured) and captured.err.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.case(28)
@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize("script", TRAINERS)
def test_a_device_that_is_not_there_is_refused_in_one_line(script, device, root, tmp_path, monkeypatch,
                                                           capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert here(script, root, f"--out {tmp_path}/run --device {device}") == 2
    expected = f"error: --device {device}: PyTorch finds no such device here; use --device auto or cpu"
    assert last_line(capsys.readouterr()) == expected
    assert not (tmp_path / "run").exists()


@pytest.mark.case(28)
@pytest.mark.long
def test_compiling_without_a_compiler_ends_in_one_line(root, tmp_path, monkeypatch):
    monkeypatch.setitem(tools.ENVIRONMENT, "CXX", "no-such-compiler")
    monkeypatch.setitem(tools.ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    said = tools.run("sft", root, f"--out {tmp_path}/run --steps 2 --compile", code=1)
    assert "error: --compile needs a C++ compiler" in said.splitlines()[-1] and "Traceback" not in said


@pytest.mark.case(28)
def test_more_ranks_than_gpus_are_refused_and_auto_takes_what_is_there(monkeypatch):
    from plumbing.hardware import pick_device
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(flags.UserError,
                       match="local rank 2 has no GPU, this machine has 2; lower --nproc.per.node"):
        pick_device("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")


# -- float16, whose loss is scaled

@pytest.fixture
def float16(monkeypatch):
    """Products in float16 with a loss scale, as on an old GPU, on this CPU."""
    monkeypatch.setattr(runtime, "pick_dtype", lambda name, device, width: torch.float16)


HALF = "--steps 8 --eval-every 100 --max-skipped 2"


@pytest.mark.case(15)
def test_in_float16_a_gradient_that_overflows_once_is_reported_lowers_the_scale_and_is_not_counted(
        float16, root, tmp_path, monkeypatch, capsys):
    scales = []
    wrap(monkeypatch, runtime.Run, "optimizer_step", lambda original, run, optimizer, *args:
         (original(run, optimizer, *args), scales.append(run.scalers[optimizer].get_scale()))[0])
    multiply_gradients(monkeypatch, {step: math.inf for step in (2, 3, 4)})
    assert here("sft", root, HALF, f"--out {tmp_path}/run") == 0
    rows = skipped(tmp_path / "run")
    assert [row["step"] for row in rows] == [3, 4, 5] and all(row["examples"] for row in rows)
    assert all(
        re.fullmatch(r"the gradient of \S+ overflowed float16; the loss is scaled by \d+ from now on",
                     row["why"]) for row in rows)
    assert scales == [2.0**16] * 2 + [2.0**15, 2.0**14] + [2.0**13] * 4
    assert len(warnings(capsys.readouterr().out)) == 3


@pytest.mark.case(15)
def test_in_float16_what_overflows_whatever_the_scale_ends_the_run(float16, root, tmp_path, monkeypatch,
                                                                   capsys):
    """After 17 halvings the loss is scaled by less than 1: it isn't the scale then."""
    multiply_gradients(monkeypatch, {step: math.inf for step in range(100)})
    assert here("sft", root, f"--steps 100 --eval-every 200 --max-skipped 2 --out {tmp_path}/run") == 1
    rows = skipped(tmp_path / "run")
    assert [("overflowed" in row["why"]) for row in rows] == [True] * 16 + [False] * 3
    assert "more than --max-skipped 2" in last_line(capsys.readouterr())


@pytest.mark.case(16)
def test_in_float16_a_spike_of_the_gradient_is_skipped_and_leaves_the_scale(float16, root, tmp_path,
                                                                            monkeypatch, capsys):
    states = {}
    wrap(monkeypatch, runtime.Run, "safe_point", lambda original, run:
         (states.setdefault(run.step, state_of(run)), original(run)) and None)
    # This scale doesn't overflow.
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**10))
    multiply_gradients(monkeypatch, {22: 30.0})
    assert here("sft", root,
                f"--steps 26 --eval-every 100 --lr 1e-5 --skip-sigma 6 --out {tmp_path}/run") == 0
    row, = skipped(tmp_path / "run")
    assert row["step"] == 23 and "deviations above" in row["why"]
    assert same_tensors(states[22], states[23]) and not same_tensors(states[23], states[24])
    assert all(scaler.get_scale() == 2.0**10 for scaler in runtime.Run.current.scalers.values())
