"""The scripts as their users meet them: in subprocesses and whole runs, with mistakes, interrupts and several ranks."""
import contextlib
import copy
import dataclasses
import datetime
import inspect
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import chat
import dpo
import evaluate
import generate
import model
import ppo
import report
import rollout as rollout_file
import reward
from plumbing import hardware
from plumbing import steps as steps_file
from plumbing import ranks
from plumbing import run as runtime
import sft
import tools
from tools import TOY
import toy
from formats.families import knows_single_turns
from formats.model_folder import load_model, read_config
from data import encode_group
from plumbing.flags import UserError, field_comments, parse_flags
from formats.sources import read_rows, split_by_prompt
from data import encode_prompt

ROOT = Path(__file__).resolve().parent.parent
DEMONSTRATIONS = f"--data {TOY}/demonstrations.jsonl"
DATA = {"sft": f"{TOY}/demonstrations.jsonl", "reward": f"{TOY}/preferences.jsonl", "dpo": f"{TOY}/preferences.jsonl",
        "ppo": f"{TOY}/prompts.jsonl", "evaluate": f"{TOY}/prompts_heldout.jsonl"}
SCRIPTS = {"sft": sft, "reward": reward, "ppo": ppo, "dpo": dpo, "evaluate": evaluate, "chat": chat, "toy": toy, "report": report}
TRAINERS = ("sft", "reward", "ppo", "dpo")
TINY = "--layers 1 --heads 2 --width 32 --block-size 64 --threads 1"
PLAN = {"sft": "--batch-tokens 512 --eval-every 2", "reward": "--batch-tokens 512 --eval-every 2", "dpo": "--batch-tokens 512 --eval-every 2",
        "ppo": "--rollout-batch 16 --minibatches 2 --max-new-tokens 12 --sample-every 2"}


def command(script, *flags, launcher=(sys.executable,), **options):
    """Run a script in a subprocess; flags may be strings of several words."""
    words = [word for flag in flags for word in shlex.split(str(flag))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*launcher, str(ROOT / f"{script}.py"), *words], capture_output=True, text=True, env=environment, timeout=240, **options)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder with a three-step run of every stage, each in a subprocess; the outputs by stage."""
    root, said = tmp_path_factory.mktemp("chain"), {}

    def run(stage, *flags):
        done = command(stage, *flags)
        assert done.returncode == 0, f"{stage}: {done.stderr}"
        said[stage] = done.stdout

    held_out = f"--val-data {TOY}/demonstrations_heldout.jsonl"
    run("sft", TINY, PLAN["sft"], DEMONSTRATIONS, held_out, f"--out {root}/sft --steps 3")
    run("toy", f"--model {root}/sft --out {root}/preferences --groups 200 --heldout-groups 40 --samples 2 --max-new-tokens 12 --threads 1")
    files = f"--data {root}/preferences/train.jsonl --val-data {root}/preferences/heldout.jsonl --model {root}/sft --threads 1 --steps 3"
    run("reward", files, PLAN["reward"], f"--demonstrations {TOY}/demonstrations.jsonl --out {root}/reward")
    run("ppo", f"--model {root}/sft --reward {root}/reward --data {TOY}/prompts.jsonl --judge toy:gold", PLAN["ppo"],
        f"--threads 1 --steps 3 --out {root}/ppo")
    run("dpo", files, PLAN["dpo"], f"--out {root}/dpo")
    run("evaluate", f"--models {root}/sft {root}/ppo {root}/dpo --out {root}/evaluation.json --prompts 20 --max-new-tokens 12 --threads 1",
        f"--data {TOY}/prompts_heldout.jsonl --judge toy:gold")
    run("report", f"--demo {root} --seconds 12")
    return root, said


@pytest.fixture
def flags(chain):
    """Flags of each trainer for runs in this process, on the chain's files."""
    root = chain[0]
    files = f"--data {root}/preferences/train.jsonl --val-data {root}/preferences/heldout.jsonl --model {root}/sft"
    inputs = {"sft": f"{TINY} {DEMONSTRATIONS}", "reward": files, "dpo": files,
              "ppo": f"--model {root}/sft --reward {root}/reward --data {TOY}/prompts.jsonl"}
    return {name: f"{inputs[name]} {PLAN[name]} --threads 1 --steps 4" for name in TRAINERS}


@contextlib.contextmanager
def signal_handlers_kept():
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    with signal_handlers_kept():
        yield


def run_here(name, *flags):
    """Run a trainer in this process."""
    script = SCRIPTS[name]
    try:
        script.main(parse_flags(script.Config, "", [word for flag in flags for word in shlex.split(str(flag))]))
    finally:
        if runtime.Run.current and runtime.Run.current.lock:
            runtime.Run.current.lock.close()  # as the end of a process does


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


# -- the whole chain

def test_every_stage_runs_and_leaves_a_checkpoint_metrics_and_a_report(chain):
    root, said = chain
    for stage in TRAINERS:
        latest = tools.latest(root / stage)
        assert latest.name == "step_000003" and {path.name for path in latest.parent.iterdir()} == {"latest.json", latest.name}
        assert {"training.safetensors", "state.json", "manifest.json"} <= {path.name for path in latest.iterdir()}
        assert {"metrics.jsonl", "run.json"} <= {path.name for path in (root / stage).iterdir()} and not list((root / stage).rglob("*.tmp"))
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            assert (root / stage / name).samefile(latest / name)
        steps = {held_out: [row["step"] for row in metrics(root / stage) if any(key.startswith("val_") for key in row) == held_out] for held_out in (False, True)}
        assert steps == {False: [1, 2, 3], True: [] if stage == "ppo" else [0, 2, 3]}  # the held-out loss before training, too
    summary = json.loads((root / "summary.json").read_text())
    wanted = {"sft.gold", "reward.accuracy", "reward.bayes_accuracy", "seconds.total"}
    wanted |= {f"{s}.{m}" for s in ("ppo", "dpo") for m in ("gold", "wins", "ties", "losses", "win_rate", "kl", "eos_rate")}
    assert wanted <= summary.keys()
    for stage in ("ppo", "dpo"):
        assert summary[f"{stage}.wins"] + summary[f"{stage}.ties"] + summary[f"{stage}.losses"] == pytest.approx(1)
    assert summary["sft"]["kl"] == 0 and summary["sft"]["ties"] == 1  # the reference against itself
    page = (root / "report.html").read_text()
    assert "data:image/png;base64," in page and "http://" not in page and "https://" not in page
    assert all((root / name).stat().st_size > 10_000 for name in ("curves.png", "ppo_metrics.png"))
    assert "[[" in said["sft"] and "<|endoftext|>]]" in said["sft"]  # one example with its mask is shown


def test_ppo_logs_what_one_watches_and_starts_at_ratio_1(chain):
    row = metrics(chain[0] / "ppo")[0]
    assert {"score", "gold", "kl", "entropy", "length", "eos_rate", "clip_fraction", "approx_kl", "explained_variance", "grad_norm",
            "critic_grad_norm", "rollout_tokens_per_second", "score_tokens_per_second", "update_tokens_per_second"} <= row.keys()
    assert row["kl"] == pytest.approx(0, abs=1e-4) and row["ratio_error"] < 1e-4  # the first rollout is the reference's


def test_reward_model_scores_demonstrations_zero_on_average(chain):
    root = chain[0]
    scorer, tokenizer = load_model(root / "reward", model.ScalarModel)
    scores = []
    rows = read_rows(DATA["sft"], "demonstrations", lambda text: None)
    # 2000 at most, evenly spread.
    for row in rows[::5]:
        ids = torch.tensor([encode_prompt(tokenizer, row.prompt) + tokenizer.encode(row.replies[0]) + [tokenizer.eos]])
        with torch.no_grad():
            scores.append(scorer.eval()(ids)[0, -1].item())
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-3)


def test_chat_answers_from_a_pipe_with_one_model_and_with_two(chain):
    root = chain[0]
    one = command("chat", f"--model {root}/sft --max-new-tokens 5", input="What is 1 + 2?\n\n/quit\nnot read\n")
    assert one.returncode == 0 and len(one.stdout.splitlines()) <= 2, one.stderr
    two = command("chat", f"--compare {root}/sft {root}/ppo --max-new-tokens 5 --system Hello", input="What is 1 + 2?\n")
    assert two.returncode == 0 and "sft: " in two.stdout and "ppo: " in two.stdout
    full = command("chat", f"--model {root}/sft --max-new-tokens 5", input="What is 1 + 2? " * 20 + "\n")
    assert full.returncode == 0 and "don't fit the model's context" in full.stdout


# -- learning, by outcome

def test_the_pipeline_learns_what_is_preferred(tmp_path):
    """Demonstrations say yes or no at even odds, people prefer yes: PPO and DPO say yes, and stop."""
    words = ["river", "stone", "apple", "window", "garden", "pencil", "candle", "bridge"]
    prompts = [f"Say {word}." for word in words]
    demonstrations = [{"instruction": p, "output": reply} for p in prompts for reply in ("It is good.", "It is sad.")]
    pairs = [{"prompt": p, "chosen": "It is good.", "rejected": "It is sad."} for p in prompts]
    for name, rows in (("sft", demonstrations), ("pairs", pairs)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    common = "--threads 1 --log-every 50"
    run_here("sft", common, f"--layers 2 --heads 2 --width 64 --block-size 64 --tokenizer {TOY} --data {tmp_path}/sft.json --out {tmp_path}/sft --steps 150 --batch-tokens 256 --lr 0.01 --val-fraction 0 --warmup 5")
    run_here("reward", common, f"--data {tmp_path}/pairs.json --val-fraction 0 --model {tmp_path}/sft --out {tmp_path}/reward --steps 30 --batch-tokens 256")
    run_here("dpo", common, f"--data {tmp_path}/pairs.json --val-fraction 0 --model {tmp_path}/sft --out {tmp_path}/dpo --steps 60 --batch-tokens 256 --lr 0.0005 --beta 0.3")
    run_here("ppo", common, f"--data {tmp_path}/pairs.json --model {tmp_path}/sft --reward {tmp_path}/reward --out {tmp_path}/ppo --steps 15 "
             "--rollout-batch 32 --max-new-tokens 12 --lr 0.0005 --kl-coef 0.3")

    def share_good(name):
        policy, tokenizer = load_model(tmp_path / name, model.GPT)
        ids = [encode_prompt(tokenizer, [{"role": "user", "content": p}]) for p in prompts for _ in range(25)]
        got = generate.generate(policy, ids, 12, tokenizer, generator=torch.Generator().manual_seed(1))
        return sum(text == "It is good." for text in got.texts(tokenizer)) / len(ids), got.ended.float().mean().item()

    before, stops = share_good("sft")
    assert 0.3 < before < 0.7 and stops > 0.95
    for name in ("ppo", "dpo"):
        after, stops = share_good(name)
        assert after > 0.9 and stops > 0.95, f"{name}: {after:.2f} say good, {stops:.2f} stop"


# -- whole steps, by hand

WORDS = ("river", "stone", "apple", "window", "garden", "pencil")
ALL_AT_ONCE = "--threads 1 --val-fraction 0 --batch-tokens 100000 --warmup 1"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a language model whose replies mostly end, another one, a reward model, and the files to train on."""
    root = tmp_path_factory.mktemp("small")
    prompts = [f"Say {'please ' * (i % 3)}{word}." for i, word in enumerate(WORDS)]
    replies = ["It is good.", "No.", "It is sad, and so it is."]
    ranks = [[0, 1], [1, 0, 2], [0, 1, 1]]
    files = {"prompts": [{"prompt": p} for p in prompts], "demonstrations": [{"instruction": p, "output": r} for p in prompts for r in replies],
             "rankings": [{"prompt": p, "completions": replies[:len(r)], "ranks": r, "margin": 0.5 * i} for i, p in enumerate(prompts) for r in [ranks[i % 3]]]}
    for name, rows in files.items():
        (root / f"{name}.json").write_text(json.dumps(rows))
    with signal_handlers_kept():
        run_here("sft", f"{TINY} {ALL_AT_ONCE} --tokenizer {TOY} --data {root}/demonstrations.json --steps 40 --lr 0.02 --out {root}/sft")
        run_here("sft", f"{ALL_AT_ONCE} --model {root}/sft --data {root}/demonstrations.json --steps 3 --out {root}/other")
        run_here("reward", f"{ALL_AT_ONCE} --model {root}/sft --data {root}/rankings.json --steps 2 --out {root}/reward")
    return root


def reply_logprob(policy, ids, mask, temperature=1.0):
    """Summed log-probability of the tokens of one reply, mask (T,), from the whole softmax."""
    logprobs = (policy.logits(policy.transformer(ids[None]))[0] / temperature).log_softmax(-1)  # (T, V)
    return sum(logprobs[t - 1, ids[t]] for t in mask.nonzero().flatten().tolist())


def formula(name, network, reference, tokenizer, folder):
    """The loss of a whole data file, every reply alone."""
    rows = read_rows(folder / ("demonstrations.json" if name == "sft" else "rankings.json"), "demonstrations" if name == "sft" else "preferences", str)
    groups = [[(torch.tensor(ids), torch.tensor(mask)) for ids, mask in encode_group(tokenizer, row)] for row in rows]
    if name == "sft":
        return -sum(reply_logprob(network, *group[0]) for group in groups) / sum(group[0][1].sum() for group in groups)
    total = 0.0
    for row, group in zip(rows, groups):
        if name == "reward":
            scores, margin = [network(ids[None])[0, -1] for ids, _ in group], row.margin
        else:
            scores, margin = [0.3 * (reply_logprob(network, *example) - reply_logprob(reference, *example).detach()) for example in group], 0.0
        pairs = [(w, l) for w, a in zip(scores, row.ranks) for l, b in zip(scores, row.ranks) if a < b]
        total = total + sum((1 + torch.exp(l - w + margin)).log() for w, l in pairs) / len(pairs) / len(rows)
    return total


@pytest.mark.case(24, 25)
@pytest.mark.parametrize("name", ["sft", "reward", "dpo"])
def test_a_step_follows_the_formula_taken_one_reply_at_a_time(name, small, tmp_path, monkeypatch):
    """Loss and gradient of the second step; a batch is all rows, in several pieces."""
    networks, steps, original = [], [], runtime.Run.optimizer_step

    def adamw(network, *args):
        networks.append(network)
        return steps_file.adamw(network, *args)

    def optimizer_step(self, *args):
        steps.append((copy.deepcopy(networks[0].state_dict()), {key: copy.deepcopy(p.grad) for key, p in networks[0].named_parameters()}))
        return original(self, *args)

    monkeypatch.setattr(SCRIPTS[name], "adamw", adamw)
    monkeypatch.setattr(runtime.Run, "optimizer_step", optimizer_step)
    file = "demonstrations" if name == "sft" else "rankings"
    run_here(name, f"{ALL_AT_ONCE} --model {small}/sft --data {small}/{file}.json --micro-batch-tokens 80 --lr 0.01 --steps 2 --out {tmp_path}/run")
    (weights, gradient), network = steps[1], networks[0].eval()
    network.load_state_dict(weights)
    loss = formula(name, network, *load_model(small / "sft", model.GPT), small)
    loss.backward()
    assert metrics(tmp_path / "run")[1]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for key, p in network.named_parameters():
        torch.testing.assert_close(gradient[key], p.grad, rtol=1e-3, atol=1e-5, msg=lambda text: f"{key}: {text}")


def test_the_held_out_loss_is_a_mean_over_reply_tokens(small):
    network, tokenizer = load_model(small / "sft", model.GPT)
    examples = [encode_group(tokenizer, row)[0] for row in read_rows(small / "demonstrations.json", "demonstrations", str)]
    run = object.__new__(runtime.Run)
    run.rank, run.world_size, run.device, run.dtype, run.step, run.clean = 0, 1, torch.device("cpu"), torch.float32, 0, False
    with torch.no_grad():
        expected = -sum(reply_logprob(network.eval(), torch.tensor(ids), torch.tensor(mask)) for ids, mask in examples) / sum(sum(mask) for _, mask in examples)
    for budget in (80, 100_000):
        loss = sft.validation_loss(run, network, examples, SimpleNamespace(micro_batch_tokens=budget), tokenizer.pad)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.case(21, 25)
@pytest.mark.parametrize("name, lost", [("sft", ("loss", "grad_norm")), ("reward", ("loss", "grad_norm")), ("dpo", ("loss", "grad_norm")), ("ppo", ("ptx_loss",))])
def test_a_rank_that_gets_no_examples_adds_nothing(name, lost, small, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.Run, "split", lambda _, examples, *rest: ranks.fill_up([], 2, examples[:1]))
    flags = {"sft": f"{ALL_AT_ONCE} --data {small}/demonstrations.json", "reward": f"{ALL_AT_ONCE} --data {small}/rankings.json",
             "ppo": f"--data {small}/prompts.json --reward {small}/reward {PLAN['ppo']} --ptx-coef 1 --ptx-data {small}/demonstrations.json --threads 1"}
    run_here(name, flags.get(name, flags["reward"]), f"--model {small}/sft --steps 1 --out {tmp_path}/run")
    row, = metrics(tmp_path / "run")
    assert all(row[key] == 0 for key in lost)


@pytest.mark.case(21, 25)
def test_ranks_share_the_examples_of_a_step_and_make_as_many_passes():
    lengths = dict(zip(range(5, 10), (3, 9, 2, 4, 1)))

    def split(examples, count, budget=1000):
        return [ranks.Ranks.split(SimpleNamespace(rank=rank, world_size=count), examples, lengths, budget) for rank in range(count)]

    assert split([5, 6, 7, 8, 9], 2) == [[([9, 7, 5], 1.0)], [([8, 6], 1.0)]]
    assert split([5], 3) == [[([5], 1.0)], [([5], 0.0)], [([5], 0.0)]]
    assert split([5, 6, 7, 8, 9], 2, budget=4) == [[([9, 7], 1.0), ([5], 1.0)], [([8], 1.0), ([6], 1.0)]]
    assert split([5, 6, 7], 2, budget=4) == [[([7], 1.0), ([5], 1.0)], [([6], 1.0), ([5], 0.0)]]


def test_every_step_and_rank_draws_from_a_seed_of_its_own_and_the_generator_from_one_of_the_step():
    def draw(seed, step, rank):
        generator = runtime.Run.seed_step(SimpleNamespace(config=SimpleNamespace(seed=seed), rank=rank, device=torch.device("cpu")), step)
        return torch.rand(1, generator=generator).item(), torch.rand(1).item()

    draws = {(seed, step, rank): draw(seed, step, rank) for seed in range(3) for step in range(5) for rank in range(4)}
    assert len({b for _, b in draws.values()}) == 60 and draw(2, 4, 3) == draws[2, 4, 3]
    assert len({a for a, _ in draws.values()}) == 15 and all(a == draws[seed, step, 0][0] for (seed, step, _), (a, _) in draws.items())  # the generator is for all ranks


@pytest.mark.case(15, 16)
@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_step_clips_the_norm_of_all_gradients_and_clears_them_and_takes_none_that_is_not_finite(fused):
    a, b = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=99.0, fused=fused)
    run = object.__new__(runtime.Run)
    run.scalers, run.device, run.dtype, run.world_size, run.attempts, run.config = {}, torch.device("cpu"), torch.float32, 1, [], SimpleNamespace(skip_sigma=0.0)
    at = torch.zeros(2)
    for size, kept in ((1.0, 1 / 5), (0.1, 1.0)):  # norms 5 and 0.5
        run.backward(size * 3 * a + size * 4 * b, optimizer)
        assert run.optimizer_step(optimizer, 0.5, max_grad_norm=1.0, batch=[]).item() == pytest.approx(5 * size)
        at = at - 0.5 * size * kept * torch.tensor([3.0, 4.0])
        assert [a.item(), b.item()] == pytest.approx(at.tolist(), rel=1e-4) and a.grad is b.grad is None
    for size in (math.nan, math.inf):
        run.backward(3 * a + size * b, optimizer)
        assert not math.isfinite(run.optimizer_step(optimizer, 0.5, max_grad_norm=1.0, batch=[7]).item())
        assert [a.item(), b.item()] == pytest.approx(at.tolist(), rel=1e-4) and a.grad is b.grad is None
    found = [(bool(attempt.bad), attempt.batch) for attempt in run.attempts]
    assert found == [(False, []), (False, []), (True, [7]), (True, [7])]


def test_weight_decay_is_of_matrices_but_not_of_embeddings():
    network = model.GPT(model.GPTConfig(11, 8, 1, 2, 2, 4))
    name_of = {p: name for name, p in network.named_parameters()}
    decay, keep = steps_file.adamw(network, 0.1, weight_decay=0.3).param_groups
    assert {name_of[p].split(".", 3)[-1] for p in decay["params"]} == {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    assert len(decay["params"]) + len(keep["params"]) == len(name_of) and (decay["weight_decay"], keep["weight_decay"]) == (0.3, 0)


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


def test_evaluation_equals_one_reply_at_a_time_and_counts_wins_against_the_first_model(small, tmp_path, monkeypatch):
    rollouts = recorded(monkeypatch, rollout_file, "generate")["generate"]
    folders = [str(small / "sft"), str(small / "other"), shutil.copytree(small / "sft", tmp_path / "sft")]
    folders = [str(folder) for folder in folders]
    (tmp_path / "prompts.json").write_text(json.dumps(json.loads((small / "prompts.json").read_text()) * 4))
    run_here("evaluate", f"--models {' '.join(folders)} --data {tmp_path}/prompts.json --reward {small}/reward --temperature 0.7 --max-new-tokens 10 "
             f"--micro-batch-tokens 80 --threads 1 --out {tmp_path}/evaluation.json")
    results = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    reference, scorer = load_model(small / "sft", model.GPT)[0], load_model(small / "reward", model.ScalarModel)[0]
    baseline = None
    for folder, (_, rollout) in zip(folders, rollouts):
        policy, result = load_model(folder, model.GPT)[0], results[folder]
        with torch.no_grad():
            rows = [(ids[:length], mask[:length]) for ids, mask, length in zip(rollout.ids, rollout.mask, rollout.lengths)]
            kl = [(reply_logprob(policy, *row, 0.7) - reply_logprob(reference, *row, 0.7)).item() for row in rows]
            scores = torch.stack([scorer(ids[None])[0, -1] for ids, _ in rows])
        baseline = scores if baseline is None else baseline
        wins, losses = ((sign * (scores - baseline) > 1e-4).float().mean().item() for sign in (1, -1))
        assert result["kl"] == pytest.approx(sum(kl) / 24, abs=1e-4) and result["score"] == pytest.approx(scores.mean().item(), abs=1e-4)
        assert (result["wins"], result["losses"], result["win_rate"]) == pytest.approx((wins, losses, wins + (1 - wins - losses) / 2))
    assert results[folders[1]]["kl"] > 0.01 and results[folders[1]]["wins"] != results[folders[1]]["losses"]


def test_ppo_decodes_no_more_rows_at_once_than_it_is_told_and_says_what_share_of_the_time_each_part_took(small, tmp_path, monkeypatch):
    passes, greedy, original = [], [], model.Transformer.forward

    def forward(self, ids, cache=None, index=None):
        if cache is not None:
            passes.append(len(ids))
        return original(self, ids, cache, index)

    monkeypatch.setattr(model.Transformer, "forward", forward)
    flags = f"--model {small}/sft --data {small}/prompts.json --reward {small}/reward {PLAN['ppo']} --threads 1 --steps 2 --temperature 0.001"
    for name, rows, most in (("all", "", 16), ("four", "--rollout-rows 4", 4)):
        passes.clear()
        run_here("ppo", flags, rows, f"--out {tmp_path}/{name}")
        assert max(passes) == most
        for row in metrics(tmp_path / name):
            shares = [row[f"{part}_share"] for part in ("rollout", "score", "update")]
            assert min(shares) > 0 and sum(shares) == pytest.approx(1)
            rates = [row[f"{part}_tokens_per_second"] * share for part, share in zip(("rollout", "score", "update"), shares)]
            assert rates[0] == pytest.approx(rates[1]) and rates[2] == pytest.approx(2 * rates[0])  # each token once, in the update in both epochs
        greedy.append(tools.metrics(tmp_path / name))
    a, b = greedy
    assert len(b) == 2 and b[0] == pytest.approx(a[0], rel=1e-3, abs=1e-4)  # the likeliest tokens are the same however many are decoded at once


def test_ppo_samples_at_its_temperature(small, tmp_path, monkeypatch):
    rollouts = recorded(monkeypatch, rollout_file, "generate")["generate"]
    run_here("ppo", f"--model {small}/sft --data {small}/prompts.json --reward {small}/reward {PLAN['ppo']} --threads 1 --steps 1 --temperature 0.001 --out {tmp_path}/run")
    policy, tokenizer = load_model(small / "sft", model.GPT)
    rollout = rollouts[0][1]
    prompts = [ids[:mask.nonzero()[0]].tolist() for ids, mask in zip(rollout.ids, rollout.mask)]
    assert torch.equal(generate.generate(policy, prompts, 12, tokenizer, temperature=0).ids, rollout.ids)  # near 0 the likeliest tokens alone


def test_ppo_trains_on_each_reply_once_an_epoch_and_logs_and_adapts_to_the_kl_of_whole_replies(small, tmp_path, monkeypatch):
    calls = recorded(monkeypatch, ppo, "kl_estimate", "policy_loss", "adapt_kl_coef")
    run_here("ppo", f"--model {small}/sft --data {small}/prompts.json --reward {small}/reward --threads 1 --steps 2 --rollout-batch 8 --epochs 2 --minibatches 4 "
             f"--lr 0.01 --warmup 1 --max-new-tokens 12 --kl-target 1 --out {tmp_path}/run")
    estimates = [args for args, _ in calls["kl_estimate"] if args[2] == "k1"]  # of each rollout: old and reference log-probabilities
    assert len(estimates) == 2 and len(calls["policy_loss"]) == 16
    for rollout, (old, ref, _) in enumerate(estimates):
        for epoch in (0, 1):
            minibatches = [args[1] for args, _ in calls["policy_loss"][8 * rollout + 4 * epoch:][:4]]
            assert sorted(row.sum().item() for part in minibatches for row in part) == pytest.approx(sorted(old.sum(1).tolist()), rel=1e-4)
        kl = sum((old - ref).sum(1).tolist()) / 8
        assert metrics(tmp_path / "run")[rollout]["kl"] == pytest.approx(kl, rel=1e-4, abs=1e-5)
        assert calls["adapt_kl_coef"][rollout][0][1] == pytest.approx(kl, rel=1e-4, abs=1e-5)
    assert abs(kl) > 0.01


# -- identities of whole runs

@pytest.mark.parametrize("name", TRAINERS)
def test_resume_after_an_interrupt_equals_never_stopping_bit_for_bit(name, flags, tmp_path):
    run_here(name, flags[name], f"--out {tmp_path}/whole")
    with stopped_in_the_second_step():
        run_here(name, flags[name], f"--out {tmp_path}/parts")
    assert tools.latest(tmp_path / "parts").name == "step_000002"
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "loss": 9.9}\n{"step": 4, "lo')  # what a kill leaves behind
    run_here(name, flags[name], f"--out {tmp_path}/parts --resume")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert tools.same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.case(25)
@pytest.mark.parametrize("name", TRAINERS)
def test_micro_batches_change_neither_loss_nor_gradient_nor_metrics(name, flags, tmp_path):
    """One forward per step or a dozen, with other padding in each: the same numbers."""
    for budget in (100, 10_000):
        run_here(name, flags[name], f"--out {tmp_path}/{budget} --micro-batch-tokens {budget} --steps 2")
    for small, large in zip(tools.metrics(tmp_path / "100"), tools.metrics(tmp_path / "10000"), strict=True):
        for row in (small, large):  # what rounding decides: ties, and the size of rounding itself
            for key in [key for key in row if key.endswith(("accuracy", "clip_fraction", "ratio_error"))]:
                del row[key]
        assert small == pytest.approx(large, rel=2e-3, abs=2e-5)


@pytest.mark.case(25)
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", TRAINERS)
def test_two_ranks_train_as_one_does(name, parallel, flags, small, tmp_path):
    """PPO: the least score, the moments, the whitening and all counts are those of both ranks, and a reply hangs on its own draws alone."""
    words = flags[name] if name != "ppo" else (
        f"--model {small}/sft --data {small}/prompts.json --reward {small}/reward --threads 1 --rollout-batch 8 --minibatches 2 --warmup 1 --lr 0.01 "
        "--critic-lr 0.01 --max-new-tokens 8 --reward-norm scale --entropy-coef 0.01")
    two = command(name, words, f"--out {tmp_path}/two --steps 2 --micro-batch-tokens {30 if name == 'ppo' else 100} --parallel {parallel}", launcher=tools.TORCHRUN)
    assert two.returncode == 0, two.stderr[-2000:]
    run_here(name, words, f"--out {tmp_path}/one --steps 2")
    rows = tools.metrics(tmp_path / "one")
    assert [row["step"] for row in rows] == [1, 2] if name == "ppo" else [0, 1, 2, 2]
    for one, other in zip(rows, tools.metrics(tmp_path / "two"), strict=True):
        for row in (one, other):  # what rounding decides: ties (policy and reference at first), and the size of rounding itself
            for key in [key for key in row if key.endswith(("accuracy", "accuracy_low", "accuracy_high", "clip_fraction", "ratio_error"))]:
                del row[key]
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
    assert name != "ppo" or 0 < one["eos_rate"] < 1


@pytest.mark.case(26)
def test_ctrl_c_saves_and_resume_goes_on_with_the_same_settings_alone(tmp_path):
    words = f"--steps 100000 --out {tmp_path}/run"
    process = tools.start("sft", tmp_path, words)
    tools.wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(metrics(tmp_path / "run")) > 3, process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume goes on" in said and "Traceback" not in said
    assert tools.latest(tmp_path / "run").name == f"step_{max(row['step'] for row in metrics(tmp_path / 'run') if 'loss' in row):06d}"
    load_model(tmp_path / "run", model.GPT)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for change, said in (("--lr 0.1", "lr was 0.005, is now 0.1"), ("--heads 1", "heads was 2, is now 1"), ("--layers 2", "layers was 1, is now 2"),
                         ("--lr 0.1 --heads 1 --override", "has another model: --heads was 2, is now 1;")):
        with pytest.raises(UserError, match=said):
            run_here("sft", *tools.words("sft", tmp_path, words, "--resume", change, "--steps 1"))  # else whoever forgets to refuse trains for hours
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


# -- mistakes: one line, exit code 2, nothing written

@pytest.mark.case(30)
@pytest.mark.parametrize("script, flags, said", [
    ("sft", "--stepz 5", "did you mean --steps?"),
    ("sft", "--steps 0", "--steps must be >= 1, got 0"),
    ("sft", "--lr -1", "--lr must be > 0, got -1.0"),
    ("sft", "--lr nan", "--lr must be > 0, got nan"),
    ("sft", "--lr fast", "invalid float value: 'fast'"),
    pytest.param("sft", "--device cuda", "PyTorch finds no such device", marks=pytest.mark.case(28)),
    ("sft", "--dtype float16", "--dtype float16 needs --device cuda"),
    ("sft", "--data nowhere.json", "nowhere.json: no such file"),
    ("sft", "--data {tmp}/rows.xlsx", "only .json, .json.gz, .jsonl"),
    pytest.param("sft", "--data {tmp}/broken.jsonl " f"--tokenizer {TOY}", "broken.jsonl:2 is not valid JSON", marks=pytest.mark.case(18)),
    pytest.param("sft", "--data {tmp}/keys.jsonl " f"--tokenizer {TOY}", "its fields are question, reply", marks=pytest.mark.case(19)),
    ("sft", "--model {tmp}", "is not a checkpoint folder: config.json is missing"),
    pytest.param("sft", "--model {root}/reward", "holds a reward model, but a language model is needed", marks=pytest.mark.case(12)),
    ("sft", "--width 30 --heads 4", "width 30 is not divisible by 4 heads"),
    pytest.param("sft", "--block-size 5", "every row is longer than the 5 tokens that the context leaves", marks=pytest.mark.case(20)),
    pytest.param("sft", "--out {root}/sft", "already holds a run; add --resume to go on with it", marks=pytest.mark.case(14)),
    pytest.param("sft", "--out {tmp}/rows.txt", "is a file; name a folder", marks=pytest.mark.case(14)),
    pytest.param("reward", "--model {root}/sft --data {tmp}/instructions.json", "doesn't hold a prompt, chosen and rejected", marks=pytest.mark.case(19)),
    pytest.param("ppo", "--model {root}/sft --reward {root}/sft", "holds a language model, but a reward model is needed", marks=pytest.mark.case(12)),
    ("ppo", "--model {root}/sft --reward {root}/reward --max-new-tokens 64", "leaves no room for a prompt"),
    ("ppo", "--model {root}/sft --reward {root}/reward --rollout-batch 10 --minibatches 3", "10 prompts are not divisible into --minibatches 3"),
    ("ppo", "--kl k4", "invalid choice: 'k4'"),
    ("ppo", "--model {root}/sft --reward {root}/reward --kl-target 6 --kl-coef 0", "--kl-target needs a --kl-coef above 0"),
    ("ppo", "--model {root}/sft --reward {root}/reward --width 64", "--width is for --model scratch"),
    pytest.param("ppo", "--model {root}/sft --reward {root}/reward --out {root}/reward --overwrite", "--overwrite would delete the --reward", marks=pytest.mark.case(14)),
    pytest.param("reward", "--model {root}/sft --data {tmp}/ranks.jsonl", "ranks.jsonl:1: a rank, a gold score or the margin is not a finite number", marks=pytest.mark.case(19)),
    ("evaluate", "--models {root}/sft --judge toy:gold --max-new-tokens 100", "leaves no room for a prompt"),
    ("evaluate", "--models {root}/sft --out {tmp}", "is a folder; name a .json file"),
    ("toy", "--model {root}/sft --out {tmp}/rows.txt", "is a file; name a folder"),
    ("dpo", "--model {root}/nowhere", "no such checkpoint folder"),
    ("dpo", "--label-smoothing 0.7", "--label-smoothing must be >= 0 and < 0.5, got 0.7"),
    ("dpo", "--label-smoothing 0.1 --loss ipo", "--label-smoothing is for --loss dpo; ipo has no probability"),
    ("dpo", "--label-smoothing 0.1 --loss hinge", "--label-smoothing is for --loss dpo; hinge has no probability"),
    ("evaluate", "", "--models: name one checkpoint folder or more"),
    ("evaluate", "--models {root}/sft --data {tmp}/instructions.json",
     "name what to judge with: --judge, --reward or --reward-fn"),
    ("evaluate", "--models {root}/sft {root}/ppo {root}/sft/", "--models names {root}/sft twice"),
    ("evaluate", "--models {root}/sft --judge toy:gold toy:gold", "the logs have another number named gold"),
    ("evaluate", "--models {root}/sft --reward {root}/reward --reward-weights 1 2",
     "2 --reward-weights for 1 rewards"),
    ("evaluate", "--models {root}/sft --reward {root}/reward --reward-weights nan",
     "--reward-weights must be finite"),
    ("sft", "--steps 5 --epochs 2", "--steps 5 and --epochs 2 both say how long to train"),
    ("reward", "--epochs 1 --steps 5", "--steps 5 and --epochs 1 both say how long to train"),
    ("dpo", "--steps 500 --epochs 2", "--steps 500 and --epochs 2 both say how long to train"),
    ("sft", "--model runs/sft",
     "runs/sft: no such checkpoint folder; python sft.py --out runs/sft makes one"),
    ("sft", "--model runs/demo/ppo/", "runs/demo/ppo/: no such checkpoint folder; bash run.sh makes it"),
    ("chat", "--model runs/mine", "runs/mine: no such checkpoint folder"),
    ("sft", "--wandb mine", "install it, or leave out --tensorboard and --wandb"),
    ("sft", "--tensorboard", "install it, or leave out --tensorboard and --wandb"),
    ("chat", "--model {root}/sft --max-new-tokens 64", "fills the context of 64"),
    ("toy", "--model {root}/sft --out {root}/preferences", "already holds preferences"),
    ("report", "--demo {tmp}", "is missing: run the stage that writes it"),
])
def test_a_mistake_ends_in_one_line_and_exit_code_2(script, flags, said, chain, tmp_path, monkeypatch, capsys):
    for package in ("wandb", "torch.utils.tensorboard"):  # as if it were not installed
        monkeypatch.setitem(sys.modules, package, None)
    said = said.format(root=chain[0])
    for name in ("rows.txt", "rows.xlsx"):
        (tmp_path / name).write_text("text")
    (tmp_path / "broken.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    (tmp_path / "keys.jsonl").write_text('{"question": "a", "reply": "b"}\n')
    (tmp_path / "instructions.json").write_text('[{"instruction": "a", "output": "b"}]')
    (tmp_path / "ranks.jsonl").write_text('{"prompt": "a", "completions": ["b", "c"], "ranks": [1e999, 1]}\n')
    words = shlex.split(flags.format(tmp=tmp_path, root=chain[0]))
    if script in TRAINERS and "--out" not in words:
        words += ["--out", str(tmp_path / "out")]
    if script in DATA and "--data" not in words:
        words += ["--data", DATA[script]]
    before = {p: p.stat().st_mtime_ns for p in chain[0].rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        runtime.run_script(SCRIPTS[script].main, SCRIPTS[script].Config, "", words)
    errors = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and said in errors[-1] and errors[-1].startswith("error: ")
    assert not (tmp_path / "out").exists() and before == {p: p.stat().st_mtime_ns for p in chain[0].rglob("*")}


@pytest.mark.case(30)
def test_a_mistake_in_a_subprocess_shows_no_traceback():
    wrong = command("sft", f"--data nowhere.json --tokenizer {TOY}")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "Traceback" not in wrong.stderr


@pytest.mark.case(7)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_is_refused_if_there_is_none(flags, tmp_path, capsys):
    words = f"{flags['sft']} --save-every 1"
    run_here("sft", words, f"--out {tmp_path}/whole")
    run_here("sft", words, f"--out {tmp_path}/run")

    def cut(checkpoint):
        path = tmp_path / "run" / "checkpoints" / checkpoint / "training.safetensors"
        path.write_bytes(path.read_bytes()[:1000])

    cut("step_000004")
    capsys.readouterr()
    run_here("sft", words, f"--out {tmp_path}/run --resume")
    said = capsys.readouterr().out
    assert "step_000004 is damaged (training.safetensors has 1,000 bytes, should have " in said and "/run after step 3" in said
    assert tools.same(tmp_path / "run", tmp_path / "whole")
    for folder in (tmp_path / "run" / "checkpoints").glob("step_*"):
        cut(folder.name)
    with pytest.raises(UserError, match="no checkpoint in .* is whole"):
        run_here("sft", words, f"--out {tmp_path}/run --resume")


@pytest.mark.case(26)
def test_resume_refuses_inputs_that_have_changed_since(flags, tmp_path):
    rows = [{"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No."}] * 4
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = f"{TINY} --tokenizer {TOY} --data {tmp_path}/rows.json --val-fraction 0 --steps 2 --out {tmp_path}/run"
    run_here("sft", words)
    (tmp_path / "rows.json").write_text(json.dumps(rows[:3]))
    with pytest.raises(UserError, match="since the run in .* began, what --data names has changed; .* --override"):
        run_here("sft", words, "--resume")
    run_here("sft", words, "--resume --override")


@pytest.mark.case(14)
def test_overwrite_replaces_a_run_and_deletes_neither_its_inputs_nor_other_files(flags, tmp_path):
    run_here("sft", flags["sft"], f"--out {tmp_path}/run --steps 2")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no such file"):
        run_here("sft", TINY, f"--out {tmp_path}/run --overwrite --data nowhere.json")
    with pytest.raises(UserError, match="would delete the --model"):
        run_here("sft", f"--out {tmp_path}/run --overwrite --model {tmp_path}/run")
    assert metrics(tmp_path / "run")[-1]["step"] == 2
    run_here("sft", flags["sft"], f"--out {tmp_path}/run --steps 1 --overwrite")
    assert metrics(tmp_path / "run")[-1]["step"] == 1 and (tmp_path / "run" / "notes.txt").exists()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_000001"]


@pytest.mark.case(23)
def test_replies_cut_off_before_their_end_never_earn_more_than_any_that_ended(chain, tmp_path, monkeypatch):
    seen = []
    original = ppo.shaped_rewards
    monkeypatch.setattr(ppo, "shaped_rewards", lambda scores, *rest: seen.append(scores.clone()) or original(scores, *rest))
    root = chain[0]
    run_here("ppo", f"--data {TOY}/prompts.jsonl --model {root}/sft --reward {root}/reward --threads 1 --steps 1 --rollout-batch 32 --max-new-tokens 8 --out {tmp_path}/run")
    share_ended = metrics(tmp_path / "run")[0]["eos_rate"]
    assert share_ended < 1  # a three-step policy rarely ends
    ordered = seen[0].sort().values
    cut_off = round(32 * (1 - share_ended))
    assert (ordered[:cut_off] == ordered[0]).all()
    if cut_off < 32:
        assert ordered[cut_off] >= ordered[0] + 1 - 1e-5


@pytest.mark.case(24)
def test_ppo_feeds_its_losses_what_one_row_at_a_time_gives(chain, tmp_path, monkeypatch):
    """Log-probabilities at the sampling temperature, values before each token, the score on the last one: no padding, by hand."""
    seen = {}

    def record(name):
        owner = rollout_file if name == "generate" else ppo
        original = getattr(owner, name)

        def recorded(*args, **options):
            out = original(*args, **options)
            seen.setdefault(name, (args, out))
            return out
        monkeypatch.setattr(owner, name, recorded)

    for name in ("generate", "shaped_rewards", "gae", "policy_loss"):
        record(name)
    root = chain[0]
    run_here("ppo", f"--data {TOY}/prompts.jsonl --model {root}/sft --reward {root}/reward --threads 1 --steps 1 --rollout-batch 8 --minibatches 1 --epochs 1 --max-new-tokens 10 "
             f"--temperature 0.7 --kl-coef 0.5 --whiten none --missing-eos-penalty 0 --micro-batch-tokens 10000 --out {tmp_path}/run")
    policy, _ = load_model(root / "sft", model.GPT)
    scorer, _ = load_model(root / "reward", model.ScalarModel)
    rollout = seen["generate"][1]
    values, rewards = seen["gae"][0][1], seen["gae"][0][0]
    old_logprobs = seen["policy_loss"][0][1]  # of the minibatch's rows, sorted by length
    expected_logprobs, per_row = [], []
    for ids, mask, length in zip(rollout.ids, rollout.mask, rollout.lengths):
        row = ids[:length][None]
        with torch.no_grad():
            logits = policy.eval().logits(policy.transformer(row))[0] / 0.7  # (T, V)
            heads = scorer.eval()(row)[0]  # (T,)
        per_row.append((mask.nonzero().flatten().tolist(), row[0], logits.log_softmax(-1), heads))
    floor = min(heads[-1].item() for _, _, _, heads in per_row)
    for b, (inside, row, logprobs, heads) in enumerate(per_row):
        score = heads[-1].item() if rollout.ended[b] else floor
        for t in inside:
            assert values[b, t].item() == pytest.approx(heads[t - 1].item(), abs=1e-4)
            assert rewards[b, t].item() == pytest.approx(score if t == inside[-1] else 0.0, abs=1e-4)  # policy = reference: no KL yet
        expected_logprobs.append(sum(logprobs[t - 1, row[t]].item() for t in inside))
    assert sorted(old_logprobs.sum(1).tolist()) == pytest.approx(sorted(expected_logprobs), abs=1e-3)


@pytest.mark.case(15)
def test_a_loss_that_is_not_finite_changes_nothing_and_ends_the_run_the_second_time_if_one_may_be_skipped(flags, tmp_path, capsys):
    with pytest.raises(runtime.Fault, match="step 3: the gradient of policy.* is not finite, and more than --max-skipped 1 batches were skipped"):
        run_here("sft", flags["sft"], f"--out {tmp_path}/run --lr 1e30 --warmup 1 --max-grad-norm 1e30 --max-skipped 1 --save-every 1")
    assert capsys.readouterr().out.count("this batch changed nothing") == 2
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in skipped] == [2, 3] and all(row["examples"] for row in skipped)
    assert tools.latest(tmp_path / "run").name == "step_000003"
    before, after = (load_file(tmp_path / "run" / "checkpoints" / f"step_00000{step}" / "model.safetensors") for step in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)


# -- the promises of the code base

@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_flag_and_every_field_is_read(name):
    config_class = SCRIPTS[name].Config
    comments = field_comments(config_class)
    sources = inspect.getsource(SCRIPTS[name]) + "".join(text for file, text in tools.sources().items() if file.removesuffix(".py") not in SCRIPTS)
    for field in dataclasses.fields(config_class):
        assert len(comments.get(field.name, "")) > 8, f"--{field.name} has no help"
        assert re.search(rf"(config|flags)\.{field.name}\b", sources), f"--{field.name} is never read"
    shown = command(name, "--help")
    assert shown.returncode == 0
    assert all("--" + field.name.replace("_", "-") in shown.stdout for field in dataclasses.fields(config_class))


@dataclasses.dataclass
class Explained:
    # A heading explains no field.

    beside: int = 1  # on its own line
    # in one line above it, with a "# sign"
    above: int = 2
    # in two lines
    # above it
    long: dict[str, int] = dataclasses.field(default_factory=dict)
    # not what is above, where there is one
    both: int = 3  # what is beside it
    silent: int = 4


@dataclasses.dataclass
class ExplainedAgain(Explained):
    """Has fields of its own: above: and below."""

    # in a subclass
    own: int = 5


def test_the_help_of_a_field_is_the_comment_beside_it_or_directly_above_it():
    expected = {"beside": "on its own line", "above": 'in one line above it, with a "# sign"',
                "long": "in two lines above it", "both": "what is beside it", "own": "in a subclass"}
    assert field_comments(ExplainedAgain) == expected


def test_importing_any_module_does_nothing(tmp_path):
    files = [file.removesuffix(".py").removesuffix("/__init__") for file in tools.sources()]
    modules = ", ".join(file.replace("/", ".") for file in files)
    code = f"import torch; state = torch.get_rng_state(), torch.get_num_threads()\nimport {modules}\n" \
           "assert torch.equal(state[0], torch.get_rng_state()) and state[1] == torch.get_num_threads()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


def test_the_readme_has_no_gaps_and_no_dead_links():
    text = (ROOT / "README.md").read_text()
    assert not re.search(r"@[A-Z]+@", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert len(links) > 10 and all((ROOT / link).exists() for link in links)


def readme_commands():
    text = (ROOT / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)).replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in blocks.splitlines() if re.search(r"\b(python|torchrun|bash)\b", line)]


def test_commands_of_the_readme_and_of_the_scripts_exist_with_their_flags():
    lines = readme_commands()
    for script in SCRIPTS.values():
        lines += [re.split(r"\s{4,}", line.strip())[0] for line in script.__doc__.splitlines() if re.match(r"\s+(python|torchrun) ", line)]
    checked = 0
    for line in lines:
        words = [w for w in shlex.split(line.split("|")[-1]) if not re.match(r"[A-Z_]+=", w)]
        file = next(w for w in words if w.endswith((".py", ".sh")))
        assert (ROOT / file).exists(), line
        if file.endswith(".py") and file[:-3] in SCRIPTS:
            parse_flags(SCRIPTS[file[:-3]].Config, "", words[words.index(file) + 1:])
            checked += 1
    assert checked > 15


@pytest.mark.case(30)
def test_run_sh_refuses_wrong_arguments():
    for words in (["--sed", "1"], ["--seed"], ["--seed", "x"]):
        done = subprocess.run(["bash", str(ROOT / "run.sh"), *words], capture_output=True, text=True)
        assert done.returncode == 2 and "error: " in done.stderr


# -- the precision of products

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize("features, width, expected", [
    ({"avx2", "avx512_bf16"}, 4096, torch.float32), (set(), 4096, torch.float32), ({"amx_tile", "amx_int8"}, 4096, torch.float32),
    ({"amx_tile", "amx_bf16"}, 255, torch.float32), ({"amx_bf16"}, 0, torch.float32), ({"amx_bf16"}, 256, torch.bfloat16), ({"amx_bf16"}, 4096, torch.bfloat16)])
def test_auto_is_bfloat16_on_a_cpu_that_multiplies_in_it_and_for_wide_models_alone(monkeypatch, features, width, expected):
    monkeypatch.setattr(hardware, "cpu_features", lambda: features)
    assert hardware.pick_dtype("auto", CPU, width) == expected
    assert hardware.pick_dtype("auto", torch.device("mps"), width) == torch.float32
    for name in ("float32", "bfloat16"):
        assert hardware.pick_dtype(name, CPU, width) == hardware.pick_dtype(name, GPU, width) == getattr(torch, name)
    with pytest.raises(UserError, match="float16 needs --device cuda"):
        hardware.pick_dtype("float16", CPU, width)


@pytest.mark.parametrize("supported", [True, False])
def test_auto_on_a_gpu_is_bfloat16_where_that_is_not_emulated(monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported and not including_emulation)
    monkeypatch.setattr(hardware, "cpu_features", lambda: {"amx_bf16"})
    assert [hardware.pick_dtype("auto", GPU, width) for width in (32, 4096)] == [torch.bfloat16 if supported else torch.float16] * 2


def test_cpu_features_are_the_words_of_proc_cpuinfo(monkeypatch):
    info = Path("/proc/cpuinfo")
    if info.exists():
        line = next((line for line in info.read_text().splitlines() if line.split(":")[0].strip() in ("flags", "Features")), ":")
        assert hardware.cpu_features() == set(line.split(":")[1].split())
        assert hardware.cpu_features() or os.uname().machine not in ("x86_64", "aarch64")
    for text, expected in (("processor\t: 0\nflags\t\t: fpu amx_bf16\nvmx flags\t: x\nflags\t\t: fpu\n", {"fpu", "amx_bf16"}), ("Features\t: fp asimd\n", {"fp", "asimd"}),
                           ("cpu\t: POWER9\n", set()), ("", set())):
        monkeypatch.setattr(Path, "exists", lambda self: True)
        monkeypatch.setattr(Path, "read_text", lambda self: text)
        assert hardware.cpu_features() == expected
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert hardware.cpu_features() == set()


def test_a_run_settles_on_the_precision_that_its_widest_model_wants(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hardware, "cpu_features", lambda: {"amx_bf16"})
    for width, dtype in ((32, "float32"), (256, "bfloat16")):
        run_here("sft", f"--layers 1 --heads 2 --width {width} --block-size 64 --threads 1 --batch-tokens 256 --steps 1 --data {small}/demonstrations.json --tokenizer {TOY} "
                 f"--model scratch --val-fraction 0 --out {tmp_path}/{width}")
        assert f"products in {dtype}" in capsys.readouterr().out


# -- which rows of a file

@pytest.mark.parametrize("name", ["sft", "reward"])
def test_training_takes_its_part_of_a_file_and_holds_prompts_out(name, tmp_path, capsys):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": f"Cube {i}.", "chosen": "Yes.", "rejected": "No."} for i in range(60)]))
    run_here(name, f"{TINY} --tokenizer {TOY} --model scratch --data {path} --part 1/2:2 --val-fraction 0.3 --steps 1 --batch-tokens 100 --out {tmp_path}/run")
    rows = split_by_prompt(read_rows(path, "preferences", str, "1/2:2"), 0.3)
    kept, held_out = map(len, rows)
    assert 5 < held_out < kept < 45
    said = capsys.readouterr().out
    assert f"{kept} training and {held_out} held-out examples" in said or f"{kept} prompts to train on and {held_out} held out" in said


# -- data and models that are not what they were

ROWS = [{"prompt": f"Say {word}.", "chosen": "Yes.", "rejected": "No."} for word in WORDS]


@pytest.mark.case(26)
@pytest.mark.parametrize("spec", ["{a}", "{a},{b}", " {a} , {b}", "{a}:0.5,{b}:0.5", "{a}:5e-1, {b}:+.5",
                                  "{b}:1,{a}:1"])
def test_resume_notices_a_file_that_has_changed_however_it_is_named(spec, tmp_path):
    for name, rows in (("a", ROWS[:3]), ("b", ROWS[3:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    spec = spec.format(a=tmp_path / "a.json", b=tmp_path / "b.json")
    flags = [f"{TINY} --tokenizer {TOY} --val-fraction 0 --steps 1 --out {tmp_path}/run",
             f"--data {shlex.quote(spec)}"]
    run_here("sft", *flags)
    run_here("sft", *flags, "--resume")
    (tmp_path / "a.json").write_text(json.dumps([*ROWS[:2], ROWS[2] | {"chosen": "Of course."}]))
    with pytest.raises(UserError, match="what --data names has changed"):
        run_here("sft", *flags, "--resume")


@pytest.mark.case(26)
def test_resume_notices_any_change_of_what_a_model_folder_is_opened_from_and_of_nothing_else(small, tmp_path):
    folder = shutil.copytree(small / "sft", tmp_path / "model")
    data = small / "demonstrations.json"
    flags = f"{ALL_AT_ONCE} --model {folder} --data {data} --steps 1 --out {tmp_path}/run"
    run_here("sft", flags)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                 "chat_template.jinja"):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes((before or b"{}") + b"\n")
        with pytest.raises(UserError, match="what --model names has changed"):
            run_here("sft", flags, "--resume")
        (folder / name).unlink() if before is None else (folder / name).write_bytes(before)
    (folder / "metrics.jsonl").unlink(), (folder / "notes.txt").write_text("mine")
    run_here("sft", flags, "--resume")


@pytest.mark.case(26)
def test_resume_notices_a_changed_folder_of_a_tokenizer(small, tmp_path):
    folder = shutil.copytree(small / "sft", tmp_path / "tokenizer")
    flags = f"{TINY} --tokenizer {folder} --data {small}/demonstrations.json --steps 1 --out {tmp_path}/run"
    run_here("sft", flags)
    run_here("sft", flags, "--resume")
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b"\n")
    with pytest.raises(UserError, match="what --tokenizer names has changed"):
        run_here("sft", flags, "--resume")


DATED = ("{{ strftime_now('%d %B') }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
         "{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.mark.case(26)
@pytest.mark.parametrize("lost", ["nothing", "run.json"])
def test_a_run_resumed_another_day_writes_the_date_of_its_beginning(lost, small, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers"), pytest.importorskip("jinja2")
    folder = shutil.copytree(small / "sft", tmp_path / "model")
    library = json.loads((folder / "tokenizer.json").read_text())
    library["model"]["ignore_merges"] = False  # so it is not our own tokenizer, which has our own template
    (folder / "tokenizer.json").write_text(json.dumps(library))
    (folder / "chat_template.jinja").write_text(DATED)
    seen = recorded(monkeypatch, sft, "encode_demonstrations")["encode_demonstrations"]

    def run_on(day, *flags):
        class Calendar(datetime.datetime):
            @classmethod
            def now(cls):
                return cls(2026, 1, day)

        monkeypatch.setattr(datetime, "datetime", Calendar)
        run_here("sft", f"{ALL_AT_ONCE} --model {folder} --data {small}/demonstrations.json",
                 f"--out {tmp_path}/run", *flags)
        tokenizer = load_model(folder, model.GPT)[1]
        return seen[-1][1], tokenizer.decode(seen[-1][1][0][0])

    with stopped_in_the_second_step():
        run_on(30, "--steps 4")
    (tmp_path / "run" / lost).unlink(missing_ok=True)
    before = seen[-1][1]
    after, text = run_on(31, "--steps 4 --resume")
    assert before == after and text.startswith("30 January")
    assert run_on(31, "--steps 4 --overwrite")[1].startswith("31 January")


# -- what is printed, and where

@pytest.mark.case(36)
@pytest.mark.parametrize("encoding", ["gbk", pytest.param("ascii", marks=pytest.mark.long)])
def test_no_letter_that_a_console_lacks_ends_a_script(encoding, small, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    reply = "Stra\u00dfe, \u010desk\u00fd, \u4e2d"
    rows = [{"instruction": f"Sag {word}. \U0001f600", "output": reply} for word in WORDS]
    data = tmp_path / "r\u00f6ws.json"
    data.write_text(json.dumps(rows))
    train = f"{TINY} --tokenizer {TOY} --val-fraction 0.3 --steps 1 --out {tmp_path}/run"
    commands = [("sft", 0, f"{train} --data {data}"), ("chat", 0, f"--model {small}/sft --max-new-tokens 4"),
                ("evaluate", 0, f"--models {small}/sft --data {data} --reward {small}/reward"),
                ("sft", 2, f"--data n\u00f6where.json --tokenizer {TOY}")]
    for script, code, flags in commands:
        done = command(script, flags, input="Wo ist die Stra\u00dfe?\n", errors="replace")
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr


def unheard(script, *flags, at_once, error=subprocess.PIPE, **options):
    """Run a script whose output nobody reads, as behind `| head` once that has its lines.

    at_once: it notices at the first line, not when a buffer is full.
    """
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, str(ROOT / f"{script}.py"), *shlex.split(" ".join(flags))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PYTHONUNBUFFERED"] = "1" if at_once else ""
    with os.fdopen(write, "wb") as output:
        return subprocess.run(words, stdout=output, stderr=error, env=environment, text=True, timeout=240,
                              **options)


@pytest.mark.case(36)
@pytest.mark.parametrize("at_once", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_script_whose_output_nobody_reads_ends_quietly_and_writes_whole_files(at_once, chain, tmp_path):
    root = shutil.copytree(chain[0], tmp_path / "demo")
    before = (root / "report.html").read_bytes()
    (root / "report.html").unlink(), (root / "summary.json").unlink()
    runs = [("sft", "--help"), ("report", f"--demo {root} --seconds 12"),
            ("evaluate", f"--models {root}/sft --data {DATA['evaluate']} --judge toy:gold --out {tmp_path}/evaluation.json --prompts 4"),
            ("toy", f"--model {root}/sft --out {tmp_path}/toy --groups 20 --heldout-groups 4 --samples 1"),
            ("sft", f"{TINY} {DEMONSTRATIONS} --steps 2 --out {tmp_path}/run")]
    for script, flags in runs:
        done = unheard(script, flags, at_once=at_once)
        expected = 128 + signal.SIGPIPE if at_once and script != "sft" else 0
        assert (done.returncode, done.stderr) == (expected, ""), script
    assert (root / "report.html").read_bytes() == before and json.loads((root / "summary.json").read_text())
    assert json.loads((tmp_path / "evaluation.json").read_text())["results"]
    files = {path.name: path.read_bytes()[-2:] for path in (tmp_path / "toy").iterdir()}
    assert files in ({}, {"train.jsonl": b"}\n", "heldout.jsonl": b"}\n"})
    assert tools.latest(tmp_path / "run").name == "step_000002"


@pytest.mark.parametrize("at_once", [False, True])
def test_a_script_that_is_cut_short_by_its_reader_ends_as_sigpipe_ends_others(at_once, chain):
    talk = f"--model {chain[0]}/sft --max-new-tokens 4"
    done = unheard("chat", talk, at_once=at_once, input="Hello.\n" * 3)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
    wrong = unheard("sft", f"--data nowhere.json --tokenizer {TOY}", at_once=at_once, error=subprocess.STDOUT)
    assert wrong.returncode == 2


def test_a_line_of_the_log_has_no_old_value_beside_a_new_step(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 10**6, 100))  # so late each time that every step has its line
    monkeypatch.setattr(runtime.time, "time", clock.__next__)
    run_here("sft", TINY, DEMONSTRATIONS, f"--batch-tokens 512 --eval-every 2 --steps 5 --log-every 2 --out {tmp_path}/run")
    measured = {row["step"]: row for row in reversed(metrics(tmp_path / "run")) if "val_loss" in row}
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"step \d/5 ", line)]
    assert len(lines) == 6 + 1
    for line in lines:
        step, (value, _, old) = int(line[5]), re.search(r"val_loss ([\d.]+)( \(step (\d)\))?", line).groups()
        assert old is None or int(old) < step
        assert value == f"{measured[int(old or step)]['val_loss']:.4g}"
    assert any("(step " in line for line in lines) and "(step " not in lines[-1].split("loss")[1]


@pytest.mark.parametrize("name", TRAINERS)
def test_help_begins_with_the_flags_of_the_script(name, capsys):
    with pytest.raises(SystemExit):
        parse_flags(SCRIPTS[name].Config, "", ["--help"])
    own, common = capsys.readouterr().out.split("flags of every training script:")
    mine = SCRIPTS[name].Config.__annotations__
    for field in dataclasses.fields(SCRIPTS[name].Config):
        flag = "\n  --" + field.name.replace("_", "-") + ("," if field.type is bool else " ")
        assert (flag in own, flag in common) == (field.name in mine, field.name not in mine), flag


def test_of_ppos_flags_steps_and_epochs_go_together():
    assert parse_flags(ppo.Config, "", ["--steps", "5", "--epochs", "3"]).epochs == 3
    assert parse_flags(sft.Config, "", ["--steps", "5", "--epochs", "0"]).steps == 5


# -- evaluate.py with other judges

JUDGES = """
def size(replies, **rest):
    return [float(len(reply)) for reply in replies]

def right(replies, answers):
    assert len(replies) == len(answers)
    return [float(answer) for answer in answers]

def wrong(replies):
    return [float("nan") if len(replies) > 1 else 0.0] * len(replies)
"""


@pytest.fixture
def judged(small, tmp_path, monkeypatch):
    """Evaluate three models by functions, on questions with answers: judged(flags) -> (results, replies)."""
    (tmp_path / "mine.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"question": f"Say {word}.", "answer": f"So it is.\n#### {i}"} for i, word in enumerate(WORDS)]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    for name in ("a", "b"):
        shutil.copytree(small / "sft", tmp_path / name / "sft")

    def evaluation(flags):
        models = f"{tmp_path}/a/sft {tmp_path}/b/sft {small}/other"
        run_here("evaluate", f"--models {models} --data {tmp_path}/questions.json --max-new-tokens 8",
                 f"--out {tmp_path}/results.json {flags}")
        found = json.loads((tmp_path / "results.json").read_text())
        return found["results"], found["replies"]

    return evaluation


def test_evaluation_scores_by_a_weighted_sum_and_names_all_of_it(small, judged, tmp_path, capsys):
    results, replies = judged(f"--reward {small}/reward --reward-fn mine:right mine:size "
                              "--reward-weights 2 10 0.5")
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[0] for line in lines[1:]] == ["a/sft", "b/sft", "other"]
    assert lines[0].split()[:4] == ["score", "score_reward", "score_mine:right", "score_mine:size"]
    assert len({len(line) for line in lines}) == 1
    for folder, result in results.items():
        parts = result["scores"]
        assert parts["mine:right"] == 2.5  # the mean of 0 to 5
        assert parts["mine:size"] == pytest.approx(sum(len(row["reply"]) for row in replies[folder]) / 6)
        assert result["score"] == pytest.approx(2 * parts["reward"] + 25 + parts["mine:size"] / 2, rel=1e-4)
        assert result["score"] == pytest.approx(sum(row["score"] for row in replies[folder]) / 6, rel=1e-4)
    assert results[str(tmp_path / "b" / "sft")]["ties"] == 1


def test_evaluation_refuses_functions_without_their_answers_and_scores_that_are_no_numbers(small, judged):
    only, _ = judged("--reward-fn mine:right")
    assert all(result["score"] == 2.5 and "scores" not in result for result in only.values())
    with pytest.raises(UserError, match="mine:wrong gave a reply of .*a/sft a score that is not finite"):
        judged("--reward-fn mine:wrong")
    with pytest.raises(UserError, match="wants answers, and no row has one"):
        judged(f"--reward-fn mine:right --data {small}/prompts.json")


def test_evaluation_at_temperature_0_has_no_kl(judged, capsys):
    results, _ = judged("--reward-fn mine:right --temperature 0")
    assert all(result["kl"] is None for result in results.values())
    head, *lines = capsys.readouterr().out.splitlines()[-4:]
    end = head.index("kl") + 2
    assert all(line[end - 10:end].strip() == "" and line[end:].strip() for line in lines)


def test_evaluation_takes_part_of_a_file_and_leaves_out_what_cannot_be_read(judged, tmp_path, capsys):
    rows = [json.dumps({"prompt": f"Cube {i}."}) for i in range(150)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, "{"]) + "\n")
    flags = f"--data {tmp_path}/rows.jsonl --reward-fn mine:size"
    with pytest.raises(UserError, match="rows.jsonl:151 is not valid JSON"):
        judged(flags)
    results, _ = judged(f"{flags} --skip-bad --part 1/2:2 --val-fraction 0.5")
    kept = split_by_prompt(read_rows(tmp_path / "rows.jsonl", "prompts", str, "1/2:2", True), 0.5)[1]
    assert {result["prompts"] for result in results.values()} == {len(kept)} and 20 < len(kept) < 80


def test_evaluation_is_one_process(chain, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        runtime.run_script(evaluate.main, evaluate.Config, "", ["--models", f"{chain[0]}/sft"])
    assert stopped.value.code == 2
    assert "one process, not 2: start it without torchrun" in capsys.readouterr().err


# -- chat.py and models that know single questions alone

@pytest.fixture
def talk(monkeypatch):
    """Ask three questions: talk(flags) -> how many messages chat.py's model was given each time."""
    def talk(flags):
        lengths, lines = [], iter(["What is 1 + 2?", "What is 2 + 2?", "What is 3 + 3?"])

        def counted(tokenizer, messages):
            lengths.append(len(messages))
            return encode_prompt(tokenizer, messages)

        monkeypatch.setattr(chat, "encode_prompt", counted)
        monkeypatch.setattr("builtins.input", lambda prompt: next(lines, "/quit"))
        run_here("chat", "--max-new-tokens 4", flags)
        return lengths

    return talk


def test_chat_forgets_what_a_model_of_single_questions_cannot_follow_and_says_so_once(chain, talk, capsys):
    root, notice = chain[0], "was trained on single questions, so it forgets"
    for stage in ("sft", "ppo", "dpo"):  # what sft.py has written, the other stages keep
        assert talk(f"--model {root}/{stage}") == [1, 1, 1]
        assert capsys.readouterr().out.count(f"({stage} {notice}") == 1
    for flags, expected in (("--history keep", [1, 3, 5]), ("--history forget", [1, 1, 1])):
        assert talk(f"--model {root}/sft {flags}") == expected
        assert notice not in capsys.readouterr().out
    assert talk(f"--model {root}/sft --system Hi") == [2, 2, 2]
    assert knows_single_turns(read_config(root / "reward")[0])


def test_sft_notes_conversations_and_leaves_open_what_models_of_others_have_seen(small, talk, tmp_path):
    texts = zip(["user", "assistant"] * 2, ("Hi.", "Yes?", "Say apple.", "Apple."))
    turns = [{"role": role, "content": text} for role, text in texts]
    (tmp_path / "talks.json").write_text(json.dumps([{"messages": turns}] * 4))
    folder = shutil.copytree(small / "sft", tmp_path / "foreign")
    header = json.loads((folder / "config.json").read_text())
    assert header["barerlhf"].pop("single_turn") is True
    (folder / "config.json").write_text(json.dumps(header))
    single, several = small / "demonstrations.json", tmp_path / "talks.json"
    starts = {"more": (small / "sft", single), "talks": (small / "sft", several), "others": (folder, single)}
    noted = {}
    for name, (start, data) in starts.items():
        run_here("sft", f"{ALL_AT_ONCE} --model {start} --data {data} --steps 1 --out {tmp_path}/{name}")
        noted[name] = json.loads((tmp_path / name / "config.json").read_text())["barerlhf"].get("single_turn")
    assert noted == {"more": True, "talks": False, "others": None}
    assert talk(f"--model {tmp_path}/talks") == talk(f"--model {tmp_path}/others") == [1, 3, 5]


def test_chat_names_two_models_by_what_tells_them_apart(judged, tmp_path):
    flags = f"--compare {tmp_path}/a/sft {tmp_path}/b/sft --max-new-tokens 4"
    both = command("chat", flags, input="What is 1 + 2?\n")
    assert both.returncode == 0 and "a/sft: " in both.stdout and "b/sft: " in both.stdout


# -- report.py

def test_a_report_made_again_keeps_the_time_and_a_demos_curves_are_another_picture(chain, tmp_path, capsys):
    root = shutil.copytree(chain[0], tmp_path / "demo")

    def seconds(flags=""):
        run_here("report", f"--demo {root} {flags}")
        found = json.loads((root / "summary.json").read_text())["seconds.total"]
        assert f"Total wall time: {found:.0f} s" in (root / "report.html").read_text()
        return found

    assert [seconds(), seconds("--seconds 30"), seconds()] == [12, 30, 30]
    before = (root / "curves.png").read_bytes()
    run_here("report", f"--curves {root}")
    assert (root / "curves.png").read_bytes() == before and (root / "stages.png").stat().st_size > 10_000
    assert capsys.readouterr().out.splitlines()[-1] == f"{root}/stages.png"
    (root / "summary.json").unlink()
    run_here("report", f"--curves {root}")
    assert (root / "curves.png").read_bytes() == (root / "stages.png").read_bytes()


def test_what_the_report_says_to_try_next_and_the_readme_write_to_different_folders():
    def folders(lines):
        return {found for line in lines for found in re.findall(r"--out (\S+)", line)}

    suggested, known = folders(line for _, line in report.TRY_NEXT), folders(readme_commands())
    assert len(suggested) == 4 and len(known) > 10
    for ours, other in itertools.product(map(Path, suggested), map(Path, known)):
        assert ours not in (other, *other.parents) and other not in ours.parents, ours


def test_recipes_leave_the_precision_to_the_machine():
    for path in (ROOT / "recipes").glob("*.sh"):
        named = re.findall(r"--dtype (\S+)", path.read_text())
        assert named and {name.strip('"') for name in named} == {"${DTYPE:-auto}"}, path


def test_dpo_says_that_margins_count_for_nothing_and_the_reward_model_uses_them(small, tmp_path, capsys):
    rows = [{"prompt": f"Cube {i}.", "chosen": "Yes.", "rejected": "No.", "margin": 0.5 * (i % 2)} for i in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = f"--model {small}/sft --data {tmp_path}/rows.json --val-fraction 0 --steps 1 --batch-tokens 500 --threads 1"
    for name, said in (("dpo", True), ("reward", False)):
        run_here(name, words, f"--out {tmp_path}/{name}")
        assert ("warning: 4 rows have a margin, which only reward.py uses" in capsys.readouterr().out) == said
