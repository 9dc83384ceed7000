"""Runs of ppo.py: when updates stop, neutral switches, resuming, ranks, mistakes, which prompts."""
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import model
import ppo
import rollout as rollout_file
import tools
from data import encode_prompt, pad_rows
from formats.model_folder import load_model
from formats.sources import read_rows, split_by_prompt
from generate import Generation, sample_token
from model import GPT
from plumbing import health, run as runtime
from plumbing.flags import UserError
from ppo import adapt_kl_coef
from tools import (
    MORE_WORDS, PPO_RUN, PTX, QUICK, ROOT, TOY, network, ptx_logprobs, quietly, rollout_of, rows_of,
    run_here, same_tensors, steps_of, train)


# -- control

def minibatch_kls(run):
    """KL(old || new) of every minibatch, summed over its pieces."""
    kls = {}
    for call in run.calls["policy_loss"]:
        kls[call.minibatch] = kls.get(call.minibatch, 0.0) + call.result[1]["approx_kl"].item()
    return [kls[key] for key in sorted(kls)]


@pytest.mark.case(17)
def test_kl_stop_ends_the_update_before_the_step_of_the_minibatch_that_is_too_far(root, tmp_path):
    flags = "--steps 1 --epochs 3 --minibatches 2 --micro-batch-tokens 60 --lr 0.02"
    whole = train(root, tmp_path / "whole", flags)
    kls = minibatch_kls(whole)
    far = kls.index(max(kls))
    assert far > 1 and len(kls) == 6 and len(whole.calls["policy_loss"]) > 6
    threshold = (max(kls[:far]) + kls[far]) / 2
    run = train(root, tmp_path / "run", flags, f"--kl-stop {threshold}")
    for name in ("policy", "critic"):
        steps = steps_of(run, name)
        assert len(steps) == far and same_tensors(steps[-1].after, steps_of(whole, name)[far - 1].after)
    assert same_tensors(network(GPT, run.out).state_dict(), steps_of(run, "policy")[-1].after)
    # The minibatch that was too far made no step.
    assert whole.rows[0]["updates"] == 6 and run.rows[0]["updates"] == far
    # Means are over those looked at.
    assert run.rows[0]["approx_kl"] == pytest.approx(sum(kls[:far + 1]) / (far + 1), rel=1e-4)


def test_after_a_stopped_update_the_next_rollout_starts_with_clean_gradients(root, tmp_path):
    run = train(root, tmp_path / "run", "--kl-stop 1e-9 --minibatches 1 --max-grad-norm 1e9")
    policy, critic = steps_of(run, "policy"), steps_of(run, "critic")
    # One step each: the second pass is too far.
    assert [step.rollout for step in policy] == [step.rollout for step in critic] == [0, 1]
    plain = train(root, tmp_path / "plain", "--epochs 1 --minibatches 1 --max-grad-norm 1e9")
    assert same_tensors(policy[1].gradient, steps_of(plain, "policy")[1].gradient)
    assert same_tensors(critic[1].gradient, steps_of(plain, "critic")[1].gradient)


@pytest.mark.parametrize("target, factor", [(1e-9, 2), (1e9, 0.5)])
def test_the_penalty_adapts_to_the_last_minibatch_and_is_used_in_the_next_rollout(
        target, factor, root, tmp_path):
    penalty = f"--policy-loss penalty --penalty-coef 0.7 --penalty-target {target}"
    flags = f"{penalty} --critic-warmup 1 --steps 4 --micro-batch-tokens 60"
    run = train(root, tmp_path / "run", flags)
    # The rollout that trains the critic alone says nothing about the policy.
    coefs = [0.7, 0.7, 0.7 * factor, 0.7 * factor**2]
    assert [row["penalty_coef"] for row in run.rows] == pytest.approx(coefs)
    assert all(call.penalty_coef == pytest.approx(coefs[call.rollout]) and call.kind == "penalty"
               for call in run.calls["policy_loss"])
    kls = minibatch_kls(run)  # of 4 minibatches in each of 3 rollouts
    expected = pytest.approx([kls[3], kls[7], kls[11]], rel=1e-5)
    assert [call.kl for call in run.calls["adapt_penalty"]] == expected
    assert {call.target for call in run.calls["adapt_penalty"]} == {target}


def test_the_penalty_stays_without_a_target(root, tmp_path, default):
    run = train(root, tmp_path / "run", "--policy-loss penalty --penalty-coef 0.7")
    assert [row["penalty_coef"] for row in run.rows] == [0.7, 0.7] and "penalty_coef" not in default.rows[0]


@pytest.mark.case(17)
def test_a_kl_beyond_its_limit_is_warned_of(root, tmp_path, default):
    assert [call.config.kl_limit for call in default.calls["diagnose"]] == [20, 20]
    assert "warning" not in default.said
    run = train(root, tmp_path / "run", "--kl-limit 1e-6 --steps 4")
    beyond = [row["step"] for row in run.rows if row["kl"] > 1e-6]
    assert beyond and max(row["kl"] for row in run.rows) < 20
    assert f"warning: step {beyond[0]:.0f}: the KL to the reference" in run.said and "--kl-limit" in run.said


def test_a_symptom_is_said_at_most_once_in_20_rollouts(root, tmp_path, monkeypatch):
    def diagnose(history, config, judges):
        return {"kl": "mind the KL"} | ({"gold": "mind the gold"} if len(history) in (4, 23) else {})

    monkeypatch.setattr(health, "diagnose", diagnose)
    run = train(root, tmp_path / "run",
                "--steps 24 --rollout-batch 2 --minibatches 1 --epochs 1 --max-new-tokens 2")
    said = [line for line in run.said.splitlines() if "mind the" in line]
    assert said == [f"warning: step {n}: mind the {what}" for n, what in ((1, "KL"), (4, "gold"), (21, "KL"))]
    for number, call in enumerate(run.calls["diagnose"], 1):  # it is shown the run so far
        assert [row["kl"] for row in call.history] == [row["kl"] for row in run.rows[:number]]


# -- neutral values

@pytest.mark.parametrize("flags, like, adds", [
    ("--reward-clip 1e9", "", set()),
    ("--advantage-clip 1e9", "", set()),
    ("--dual-clip 1e9", "", set()),
    ("--kl-stop 1e9", "", set()),
    ("--kl-limit 1e9", "", set()),
    ("--ema 0.9", "", set()),
    ("--critic-init reward", "", set()),
    ("--reward-weights 1", "", set()),
    ("--penalty-coef 5", "", set()),  # of the other policy loss
    ("--kl-horizon 16", "", set()),  # of no controller
    ("--ptx-tokens 7", "", set()),  # of no data
    ("--kl-in loss --kl k2 --kl-coef 0", "--kl-coef 0", {"kl_loss"}),
    ("--policy-loss penalty --penalty-coef 0 --clip 1e9", "--clip 1e9", {"penalty_coef"}),
])
def test_a_switch_at_its_neutral_value_changes_no_metric_and_no_weight(flags, like, adds, root, tmp_path):
    run, plain = train(root, tmp_path / "run", flags), train(root, tmp_path / "plain", like)
    assert [{k: v for k, v in row.items() if k not in adds} for row in run.rows] == plain.rows
    for file in ("model.safetensors", "config.json"):
        assert (run.out / file).read_bytes() == (plain.out / file).read_bytes()
    assert same_tensors(steps_of(run, "critic")[-1].after, steps_of(plain, "critic")[-1].after)


def test_critic_warmup_leaves_beta_alone_and_the_policys_schedule_for_later(root, tmp_path):
    rows = train(root, tmp_path / "run",
                 "--critic-warmup 2 --steps 4 --warmup 2 --lr 0.01 --kl-target 6 --kl-horizon 16").rows
    assert [row["kl_coef"] for row in rows[:3]] == [rows[0]["kl_coef"]] * 3
    assert [row["lr"] for row in rows] == pytest.approx([0, 0, 0.005, 0.01])


@pytest.mark.parametrize("flag", ["--kl-stop 0.1", "--policy-loss penalty --penalty-target 0.1"])
def test_what_looks_at_how_far_an_update_has_gone_needs_more_than_one_step(flag, root, tmp_path):
    with pytest.raises(UserError, match="need more than one of --epochs or --minibatches"):
        train(root, tmp_path / "run", f"{flag} --epochs 1 --minibatches 1")


# -- resuming

STATEFUL = ("--reward-norm standard --kl-target 0.05 --kl-horizon 40 --policy-loss penalty "
            "--penalty-target 0.001 --ema 0.8 --ptx-coef 0.5 --critic-warmup 1 --steps 4 " + PTX)


@pytest.fixture(scope="module")
def stateful(root, tmp_path_factory):
    """A run that is not stopped, with everything that has a state."""
    run = train(root, tmp_path_factory.mktemp("stateful") / "run", STATEFUL)
    assert len({row["kl_coef"] for row in run.rows}) == 3
    assert len({row["penalty_coef"] for row in run.rows}) > 2
    return run


# Where a run is told to stop: a function, the rollout (from 0); each time two rollouts are kept.
INTERRUPTED = {
    "sampling": (rollout_file, "uniforms", 2),
    "scoring": (ppo, "forward", 2),
    "updating": (runtime.Run, "optimizer_step", 1),
}


def interrupted(where, *arguments, **options):
    """A run that is told to stop."""
    owner, name, rollout = INTERRUPTED[where]
    original = getattr(owner, name)

    def stopping(*args, **options):
        run = runtime.Run.current
        run.stop_signal = signal.SIGTERM if run.step == rollout else None
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(owner, name, stopping)
        train(*arguments, **options)
    assert stopped.value.code == 128 + signal.SIGTERM


def state_of(folder):
    """state.json of a run's newest checkpoint."""
    return json.loads((tools.latest(folder) / "state.json").read_text())


@pytest.mark.case(3)
@pytest.mark.parametrize("where", INTERRUPTED)
def test_resuming_with_everything_that_has_a_state_equals_never_stopping_bit_for_bit(
        where, stateful, root, tmp_path):
    whole = stateful
    interrupted(where, root, tmp_path / "parts", STATEFUL)
    assert state_of(tmp_path / "parts")["step"] == len(tools.metrics(tmp_path / "parts")) == 2
    parts = train(root, tmp_path / "parts", STATEFUL, "--resume")
    assert parts.rows == whole.rows and [call.rollout for call in parts.calls["gae"]] == [0, 1]
    for file in ("model.safetensors", "config.json", "ema/model.safetensors", "ema/config.json"):
        assert (parts.out / file).read_bytes() == (whole.out / file).read_bytes(), file
    assert tools.same(whole.out, parts.out)
    state, tensors = state_of(whole.out), load_file(tools.latest(whole.out) / "training.safetensors")
    expected = {"policy", "critic", "ema", "policy_optimizer", "critic_optimizer"}
    assert {key.split("/")[0] for key in tensors} == expected
    assert state["extra"].keys() == {"kl_coef", "penalty_coef", "moments"}
    assert state["extra"]["moments"][0] == 4 * 16
    # It remembers the rollouts before the stop.
    assert [len(call.history) for call in parts.calls["diagnose"]] == [3, 4]


@pytest.mark.case(26)
@pytest.mark.parametrize("flag", ["reward", "ptx_data"])
def test_resume_refuses_when_a_later_reward_or_the_demonstrations_have_changed(flag, root, tmp_path):
    demonstrations = tmp_path / "demonstrations.json"
    demonstrations.write_bytes((root / "demonstrations.json").read_bytes())
    (tmp_path / "other").mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "other" / file).write_bytes((root / "other" / file).read_bytes())
    flags = f"--ptx-coef 1 --ptx-data {demonstrations}", f"--reward {{root}}/reward {tmp_path}/other"
    train(root, tmp_path / "run", flags[0], "--steps 1", reward=flags[1])
    if flag == "reward":
        (tmp_path / "other" / "model.safetensors").write_bytes(
            (root / "reward" / "model.safetensors").read_bytes())
    else:
        demonstrations.write_text(json.dumps(json.loads(demonstrations.read_text())[1:]))
    with pytest.raises(
            UserError,
            match=f"since the run in .* began, what --{flag.replace('_', '-')} names has changed; "):
        train(root, tmp_path / "run", flags[0], "--steps 1 --resume", reward=flags[1])


def test_resuming_after_stopped_updates_goes_on_with_the_right_demonstrations(root, tmp_path):
    flags = "--kl-stop 0.0005 --ptx-coef 1 --steps 4 " + PTX
    whole = train(root, tmp_path / "whole", flags)
    assert min(row["updates"] for row in whole.rows[:2]) < 4
    interrupted("updating", root, tmp_path / "parts", flags)
    assert train(root, tmp_path / "parts", flags, "--resume").rows == whole.rows


def test_overwriting_a_run_does_not_delete_the_average_that_it_starts_from(root, tmp_path):
    train(root, tmp_path / "run", "--ema 0.5 --steps 1")
    with pytest.raises(UserError, match="would delete the --model"):
        train(root, tmp_path / "run", f"--model {tmp_path}/run/ema --steps 1 --overwrite")
    assert (tmp_path / "run" / "ema" / "model.safetensors").exists()


# -- ranks and caches

AGREEING = """
import sys
import torch
import torch.distributed as dist
import ppo
from plumbing import checkpoints, run as runtime

def agreed(tensor):
    least, most = tensor.clone(), tensor.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN), dist.all_reduce(most, dist.ReduceOp.MAX)
    assert torch.equal(least, tensor) and torch.equal(most, tensor)

def _save(self, last):
    for tensor in checkpoints.training_state(self.modules, self.optimizers).values():
        agreed(tensor.detach().clone())
    kept = [self.step, self.state["kl_coef"], self.state["penalty_coef"], *self.state["moments"]]
    agreed(torch.tensor(kept, dtype=torch.float64))
    plain["_save"](self, last)

def whiten(x, mask, *options):
    whitened = plain["whiten"](x, mask, *options)
    sums = torch.stack([whitened.sum(), whitened.square().sum(), mask.sum().float()])
    assert abs(sums[0]) > 0.1  # the ranks' means differ
    dist.all_reduce(sums)
    assert abs(sums[0]) < 1e-3 and abs(sums[1] / sums[2] - 1) < 1e-4
    return whitened

def adapt_penalty(penalty_coef, kl, target):
    agreed(torch.tensor(kl))
    return plain["adapt_penalty"](penalty_coef, kl, target)

def missing_eos_scores(scores, ended, rule, penalty, lowest):
    agreed(lowest)
    return plain["missing_eos_scores"](scores, ended, rule, penalty, lowest)

def backward(self, loss, optimizer):
    if not losses:  # that of the first batch of demonstrations: a single row, which one rank alone may count
        losses.append(loss.detach().clone())
        dist.all_reduce(losses[0])
        self.say(f"first loss {losses[0].item()}")
    plain["backward"](self, loss, optimizer)

losses, plain = [], {}
for owner, function in ((runtime.Run, _save), (runtime.Run, backward), (ppo, whiten), (ppo, adapt_penalty),
                        (ppo, missing_eos_scores)):
    plain[function.__name__] = getattr(owner, function.__name__)
    setattr(owner, function.__name__, function)
runtime.run_script(ppo.main, ppo.Config, "", sys.argv[1:])
"""


def test_two_ranks_agree_on_weights_averages_moments_and_when_to_stop(root, tmp_path):
    (tmp_path / "agreeing.py").write_text(AGREEING)
    (tmp_path / "mine.py").write_text(
        "import os\n\ndef rank(prompts, replies):\n    return [float(os.environ['RANK'])] * len(replies)\n")
    flags = ("--reward {root}/reward --reward-fn mine:rank --reward-norm standard --kl-target 0.1 "
             "--policy-loss penalty --penalty-target 0.001 --ema 0.8 --ptx-coef 0.5 "
             "--ptx-data {root}/demonstrations.json --ptx-tokens 20 --kl-stop 0.002 --lr 0.02 --save-every 1")
    words = shlex.split(f"{PPO_RUN} {flags} --out {tmp_path}/run".format(root=root))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launcher, str(tmp_path / "agreeing.py"), *words],
                          capture_output=True,
                          text=True,
                          timeout=240,
                          cwd=tmp_path,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert min(row["updates"] for row in rows) < 4
    # Of both ranks.
    assert rows[1]["kl_coef"] == pytest.approx(
        adapt_kl_coef(0.1, rows[0]["kl"], target=0.1, replies=16, horizon=10000))
    with torch.no_grad():
        logprobs = ptx_logprobs(root, network(GPT, root / "sft"), 0, budget=20)
    assert float(re.search("first loss (.*)", done.stdout)[1]) == pytest.approx(-0.5 * logprobs.mean().item(),
                                                                                rel=1e-4)
    # The mean over the ranks, each of which scored with its own number.
    assert {row["score_mine:rank"] for row in rows} == {0.5}
    assert state_of(tmp_path / "run")["extra"]["moments"][0] == 2 * 16


def rank_of(number, monkeypatch, rank, root, out, flags):
    """What one of several ranks does with its part of the data, the others being silent: nothing is added to
    its sums."""
    with monkeypatch.context() as patch:
        patch.setenv("RANK", str(rank)), patch.setenv("WORLD_SIZE", str(number))
        for name, stand_in in {
                "join": lambda *args: None, "_from_main": lambda self, read: read(),
                "_arrive": lambda *args: None, "_all": lambda self, tensor, how: tensor,
                "any_rank": lambda self, flag: flag, "parallel": lambda self, module: module
        }.items():
            patch.setattr(runtime.Run, name, stand_in)
        return train(root, out, flags)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_prompts_replies_and_minibatches_as_one_process_has_them(ranks, root, tmp_path,
                                                                             monkeypatch):
    """Every reply is once in an epoch, every rank has as many in a minibatch, and which are together hangs on
    no rank."""
    rows = json.loads((root / "prompts.json").read_text())
    rows += [{"prompt": f"Say {word} and {word}."} for word in MORE_WORDS]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))  # 16 of them: none comes twice in a rollout
    # All play the same policy, nearly.
    flags = f"--data {tmp_path}/prompts.json --epochs 3 --minibatches 4 --lr 1e-9 --critic-lr 1e-9"
    one = train(root, tmp_path / "one", flags)
    parts = [rank_of(ranks, monkeypatch, rank, root, tmp_path / str(rank), flags) for rank in range(ranks)]
    for rollout in (0, 1):
        dealt = [[tuple(prompt) for prompt in run.calls["generate"][rollout].prompts]
                 for run in (one, *parts)]
        assert [len(prompts) for prompts in dealt] == [16] + [16 // ranks] * ranks
        # By length, one after the other.
        assert dealt[0] == sorted(dealt[0], key=len)
        assert dealt[0] == [prompt for together in zip(*dealt[1:]) for prompt in together]
        replies = [{
            tuple(ids[~mask][:len(prompt)].tolist()): ids[mask].tolist()
            for ids, mask, prompt in zip(generated.ids, generated.mask, prompts)
        }
                   for generated, prompts in zip((rollout_of(run, rollout) for run in (one, *parts)), dealt)]
        assert replies[0] == {prompt: reply for part in replies[1:] for prompt, reply in part.items()}
        assert len(replies[0]) == 16
        batches = [[step.batch for step in steps_of(run, "critic") if step.rollout == rollout]
                   for run in (one, *parts)]
        assert [[len(batch) for batch in run] for run in batches] == [[4] * 12] + [[4 // ranks] * 12] * ranks
        for number, whole in enumerate(batches[0]):
            assert set(whole) == {prompt for part in batches[1:] for prompt in part[number]}
        epochs = [batches[0][4 * epoch:][:4] for epoch in range(3)]
        # Each reply once.
        assert all(len({prompt for batch in epoch for prompt in batch}) == 16 for epoch in epochs)
        assert len({frozenset(map(frozenset, epoch)) for epoch in epochs}) == 3  # mixed anew


@pytest.mark.case(33)
@pytest.mark.parametrize("rows", [0, 5])
def test_a_run_that_decodes_without_a_cache_takes_the_very_steps_of_one_that_has_a_cache(
        rows, root, tmp_path, monkeypatch):
    flags = f"--steps 3 --temperature 0.8 --rollout-rows {rows}"
    cached = train(root, tmp_path / "cached", flags)

    def generate(policy, prompts, max_new_tokens, tokenizer, temperature, rows, uniform, interrupted):
        replies = []
        for prompt, numbers in zip(prompts, uniform):
            ids = list(prompt)
            while len(ids) == len(prompt) or (ids[-1] not in tokenizer.stops
                                              and len(ids) < len(prompt) + max_new_tokens):
                with torch.no_grad():
                    logits = policy.logits(policy.transformer(torch.tensor([ids])))[:, -1]
                ids.append(
                    sample_token(logits, temperature, 0, 1.0, numbers[None, len(ids) - len(prompt)]).item())
            replies.append(ids)
        ids, lengths = pad_rows(replies, tokenizer.pad)
        mask = pad_rows([[False] * len(prompt) + [True] * (len(reply) - len(prompt))
                         for prompt, reply in zip(prompts, replies)], False)[0]
        return Generation(ids, mask, lengths,
                          torch.tensor([reply[-1] in tokenizer.stops for reply in replies]))

    monkeypatch.setattr(rollout_file, "generate", generate)
    plain = train(root, tmp_path / "plain", flags)
    assert len(cached.calls["generate"]) == 3
    assert 0 < sum(rollout_of(cached, i).ended.sum() for i in range(3)) < 3 * 16
    for number in range(3):
        assert all(torch.equal(a, b) for a, b in zip(rollout_of(cached, number), rollout_of(plain, number)))
    assert plain.rows == cached.rows and tools.same(plain.out, cached.out)


def test_ppo_decodes_no_more_rows_at_once_than_it_is_told_and_says_what_share_of_the_time_each_part_took(
        small, tmp_path, monkeypatch):
    passes, greedy, original = [], [], model.Transformer.forward

    def forward(self, ids, cache=None, index=None):
        if cache is not None:
            passes.append(len(ids))
        return original(self, ids, cache, index)

    monkeypatch.setattr(model.Transformer, "forward", forward)
    inputs = f"--model {small}/sft --data {small}/prompts.json --reward {small}/reward"
    flags = f"{inputs} {QUICK['ppo']} --threads 1 --steps 2 --temperature 0.001"
    for name, rows, most in (("all", "", 16), ("four", "--rollout-rows 4", 4)):
        passes.clear()
        run_here("ppo", flags, rows, f"--out {tmp_path}/{name}")
        assert max(passes) == most
        for row in rows_of(tmp_path / name):
            shares = [row[f"{part}_share"] for part in ("rollout", "score", "update")]
            assert min(shares) > 0 and sum(shares) == pytest.approx(1)
            rates = [
                row[f"{part}_tokens_per_second"] * share
                for part, share in zip(("rollout", "score", "update"), shares)
            ]
            # Each token once, in the update in both epochs.
            assert rates[0] == pytest.approx(rates[1]) and rates[2] == pytest.approx(2 * rates[0])
        greedy.append(tools.metrics(tmp_path / name))
    a, b = greedy
    # The likeliest tokens are the same however many are decoded at once.
    assert len(b) == 2 and b[0] == pytest.approx(a[0], rel=1e-3, abs=1e-4)


# -- mistakes: one line, exit code 2, nothing written

MISTAKEN = """
def short(prompts, replies): return [1.0] * (len(replies) + 1)
def nan(prompts, replies): return [float("nan")] * len(replies)
def words(prompts, replies): return ["good"] * len(replies)
def nothing(prompts, replies): return None
def single(prompts): return [1.0] * len(prompts)
def strange(questions, replies): return [1.0] * len(replies)
def table(prompts, replies): return [[1.0]] * len(replies)
"""


@pytest.mark.case(30)
@pytest.mark.parametrize("flags, said", [
    ("--kl-target 6 --kl-coef 0", "--kl-target needs a --kl-coef above 0"),
    ("--kl-target 6 --kl-horizon 8", "--kl-horizon must be at least --rollout-batch"),
    ("--dual-clip 0.5", "--dual-clip must be above 1"),
    ("--dual-clip 1", "--dual-clip must be above 1"),
    ("--dual-clip 3 --policy-loss penalty", "and is for --policy-loss clip"),
    ("--penalty-target 0.01", "--penalty-target is for --policy-loss penalty"),
    ("--penalty-target 0.01 --policy-loss penalty --penalty-coef 0", "with a --penalty-coef above 0"),
    ("--ptx-coef 1", "--ptx-coef and --ptx-data go together"),
    (f"--ptx-data {TOY}/demonstrations.jsonl", "--ptx-coef and --ptx-data go together"),
    ("--ptx-coef 1 --ptx-data nowhere.json", "nowhere.json: no such file"),
    ("--ptx-coef 1 --ptx-data {root}/prompts.json", "doesn't hold a prompt and a reply"),
    ("--critic-warmup 2", "--critic-warmup 2 leaves none of 2 rollouts"),
    ("--rollout-batch 15", "15 prompts are not divisible into --minibatches 2"),
    ("--reward-weights 1 2", "2 --reward-weights for 1 rewards"),
    # In the order of the weights.
    ("--reward-fn mistaken:short --reward-weights 1", "reward, mistaken:short)"),
    ("--reward-weights heavy", "invalid float value: 'heavy'"),
    ("--reward {root}/reward {root}/sft", "holds a language model, but a reward model is needed"),
    ("--reward {root}/reward {root}/other --out {root}/other --overwrite",
     "--overwrite would delete the --reward"),
    ("--reward-fn mistaken", "write module:function"),
    ("--reward-fn :short", "write module:function"),
    ("--reward-fn mistaken:", "write module:function"),
    ("--reward-fn no_such_module:score", "can't be imported (ModuleNotFoundError"),
    ("--reward-fn mistaken:missing", "can't be imported (AttributeError"),
    ("--reward-fn broken:score", "can't be imported (ZeroDivisionError"),
    ("--reward-fn math:pi", "math:pi can't be imported (TypeError"),
    ("--reward-fn mistaken:short", "must return one finite number for each of 1 replies, got shape (2,)"),
    ("--reward-fn mistaken:table", "got shape (1, 1)"),
    ("--reward-fn mistaken:nan", "must return one finite number"),
    ("--reward-fn mistaken:words", "mistaken:words failed"),
    ("--reward-fn mistaken:nothing", "mistaken:nothing failed"),
    ("--reward-fn mistaken:single", "mistaken:single has no parameter named replies"),
    ("--reward-fn mistaken:strange", "its parameter questions is none of prompts, replies, answers"),
    ("--ema 1", "--ema must be >= 0 and < 1, got 1.0"),
    ("--gamma 1.5", "--gamma must be >= 0 and <= 1, got 1.5"),
    ("--lam -0.1", "--lam must be >= 0 and <= 1, got -0.1"),
    ("--kl-limit 0", "--kl-limit must be > 0"),
    ("--reward-clip -1", "--reward-clip must be >= 0"),
    ("--value-clip nan", "--value-clip must be >= 0, got nan"),
    ("--critic-warmup -1", "--critic-warmup must be >= 0"),
    ("--missing-eos pad", "invalid choice: 'pad'"),
    ("--whiten batch", "invalid choice: 'batch'"),
    ("--lr-schedule step", "invalid choice: 'step'"),
])
def test_a_mistake_ends_in_one_line_before_anything_is_written(flags, said, root, tmp_path, monkeypatch,
                                                               capsys):
    (tmp_path / "mistaken.py").write_text(MISTAKEN)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    reward = "" if "--reward " in flags else "--reward {root}/reward"
    out = "" if "--out" in flags else f"--out {tmp_path}/out"
    words = shlex.split(f"{PPO_RUN} {reward} {flags} {out}".format(root=root))
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    try:
        with pytest.raises(SystemExit) as stopped:
            runtime.run_script(ppo.main, ppo.Config, "", words)
    finally:
        sys.modules.pop("mistaken", None)  # the next one finds its own
    errors = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert said in errors[0]
    assert not (tmp_path / "out").exists() and before == {p: p.stat().st_mtime_ns for p in root.rglob("*")}


def test_a_critic_from_the_reward_model_needs_one(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine",
                        SimpleNamespace(zero=lambda prompts, replies: [0.0] * len(replies)))
    with pytest.raises(UserError, match="--critic-init reward needs a --reward folder"):
        train(root, tmp_path / "run", "--critic-init reward", reward="--reward-fn mine:zero")
    assert not (tmp_path / "run").exists()


# -- which prompts

def test_ppo_takes_its_part_of_the_prompts_and_evaluation_those_that_no_stage_has_seen(root, tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"prompt": f"Say {word} {i}."} for word in MORE_WORDS for i in range(8)]))
    kept, held_out = split_by_prompt(read_rows(path, "prompts", str, "1/1:2"), 0.4)
    assert 5 < len(held_out) < len(kept) < 30
    flags = f"--data {path} --part 1/1:2 --val-fraction 0.4 --max-new-tokens 4 --threads 1"
    run = train(root, tmp_path / "run", flags, "--steps 1 --rollout-batch 64")
    assert f"{len(kept)} prompts, for instance" in run.said
    tokenizer = load_model(root / "sft", GPT)[1]
    expected = {tuple(encode_prompt(tokenizer, row.prompt)) for row in kept}
    assert {tuple(ids) for ids in run.calls["generate"][0].prompts} == expected
    with quietly():
        run_here("evaluate",
                 f"{flags} --models {root}/sft --reward {root}/reward --out {tmp_path}/evaluation.json")
    replies, = json.loads((tmp_path / "evaluation.json").read_text())["replies"].values()
    assert [reply["prompt"] for reply in replies] == [row.text for row in held_out]
