"""PPO's switches: each function against a closed form, an enumeration or a slow loop, each flag by what it does to a whole run.

B replies, T tokens, n reply tokens of a rollout. The runs are tiny and in this process; `train` records what they compute.
"""
import contextlib
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import evaluate
import judges
from plumbing import steps as steps_file
import ppo
import reward
import rollout as rollout_file
from plumbing import run as runtime
import sft
import tools
from tools import TOY
from formats.model_folder import load_model, save_model
from data import collate, encode_group, endless_batches, pad_rows
from plumbing.flags import UserError, parse_flags
from formats.sources import read_rows, split_by_prompt
from model import GPT, GPTConfig, ScalarModel
from generate import Generation, sample_token
from plumbing.steps import scheduled_lr
from judges import short_names
from ppo import adapt_kl_coef, adapt_penalty, diagnose, explained_variance, gae, missing_eos_scores, kl_estimate, kl_loss, normalise_scores, policy_loss
from ppo import shaped_rewards, steps_mask, update_moments, value_loss, variance, whiten
from formats.tokenizer import Tokenizer
from data import encode_prompt

ROOT = Path(__file__).resolve().parent.parent


def responses(*spans, T=9):
    """A (B, T) mask with one run of True per (start, end)."""
    return torch.tensor([[start <= t < end for t in range(T)] for start, end in spans])


SPANS = ((2, 6), (1, 9), (4, 5), (3, 3))  # four tokens, up to the edge, one token, none
MASK = responses(*SPANS)


def on_ranks(number, function):
    """[function(rank, all_sum) of each rank], on threads whose all_sum adds up their tensors."""
    barrier, given, results = threading.Barrier(number, timeout=20), [None] * number, [None] * number

    def work(rank):
        def all_sum(tensor):
            given[rank] = tensor
            barrier.wait()
            total = sum(given)
            barrier.wait()
            return total
        results[rank] = function(rank, all_sum)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(number)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    return results


# -- scores

@pytest.mark.parametrize("rule, cut_off", [("floor", [-2.5, -2.5]), ("replace", [-0.5, -0.5]), ("subtract", [0.5, -2.5])])
def test_a_missing_end_token_is_judged_by_its_rule_and_replies_that_ended_keep_their_score(rule, cut_off):
    scores, ended = torch.tensor([3.0, 1.0, -1.0, -2.0]), torch.tensor([True, False, True, False])
    got = missing_eos_scores(scores, ended, rule, penalty=0.5, lowest=torch.tensor(-2.0))
    assert got.tolist() == [3.0, cut_off[0], -1.0, cut_off[1]]
    assert torch.equal(missing_eos_scores(scores, torch.ones(4, dtype=torch.bool), rule, 0.5, scores.min()), scores)
    lower = missing_eos_scores(scores, ended, "floor", 0.0, torch.tensor(-7.0))  # another rank's reply was worse
    assert lower.tolist() == [3.0, -7.0, -1.0, -7.0]


@pytest.mark.parametrize("sizes", [(60,), (1,) * 60, (1, 2, 57), (20, 20, 20), (59, 1)])
def test_running_moments_are_those_of_the_whole_stream_however_it_is_cut(sizes):
    stream = torch.randn(60, generator=torch.Generator().manual_seed(0)) * 3 + 5
    moments, seen = [0, 0.0, 0.0], 0
    for part in stream.split(sizes):
        moments, seen = update_moments(moments, part), seen + len(part)
        so_far = stream[:seen].numpy().astype(np.float64)
        assert moments[0] == seen and moments[1] == pytest.approx(so_far.mean(), rel=1e-5)
        assert moments[2] == pytest.approx(((so_far - so_far.mean()) ** 2).sum(), rel=1e-5, abs=1e-9)
    assert moments[2] / (moments[0] - 1) == pytest.approx(stream.numpy().var(ddof=1), rel=1e-5)


def test_running_moments_of_two_ranks_are_those_of_both_their_scores():
    scores = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1)) + torch.tensor([[[0.0], [4.0]]])  # rollouts, ranks, replies

    def stream(rank, all_sum):
        moments = [0, 0.0, 0.0]
        for rollout in scores:
            moments = update_moments(moments, rollout[rank], all_sum)
        return moments

    mine, other = on_ranks(2, stream)
    assert mine == other and mine[0] == 30 and mine[1] == pytest.approx(scores.mean().item(), rel=1e-5)
    assert mine[2] / 29 == pytest.approx(scores.numpy().var(ddof=1), rel=1e-5)


@pytest.mark.case(31)
def test_scores_are_scaled_or_standardised_by_the_moments_and_then_clipped():
    scores, moments = torch.tensor([-4.0, 2.0, 8.0]), [5, 2.0, 36.0]  # a deviation of 3
    expected = {("none", 0): [-4, 2, 8], ("none", 5): [-4, 2, 5], ("scale", 0): [-4 / 3, 2 / 3, 8 / 3], ("scale", 1): [-1, 2 / 3, 1],
                ("standard", 0): [-2, 0, 2], ("standard", 1.5): [-1.5, 0, 1.5]}
    for (kind, clip), values in expected.items():
        assert normalise_scores(scores, moments, kind, clip).tolist() == pytest.approx(values), (kind, clip)
    assert normalise_scores(scores, [0, 0.0, 0.0], "none", 0) is scores
    assert normalise_scores(torch.zeros(3), [3, 0.0, 0.0], "scale", 0).tolist() == [0, 0, 0]  # no deviation at all


# -- where the score lands

def test_the_step_after_the_last_token_exists_for_all_but_the_longest_replies():
    assert steps_mask(MASK, "eos") is MASK
    assert torch.equal(steps_mask(MASK, "next"), responses((2, 7), (1, 9), (4, 6), (3, 3)))
    assert torch.equal(steps_mask(responses((5, 7), (0, 2), (4, 5)), "next"), responses((5, 7), (0, 2), (4, 6)))  # whatever their prompts


@pytest.mark.parametrize("lam", [0.95, 0.5, 0.0, 1.0])
def test_a_score_one_step_later_changes_advantages_by_the_known_amount(lam):
    """A_t grows by (1 - lam) lam^(T - t) (V_T+1 - score): nothing at lam 1. The longest reply takes the score at its last token."""
    torch.manual_seed(0)
    scores, kl, values = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.rand(4, 9), torch.randn(4, 9)
    kl = kl * MASK  # a token of the policy's own alone has a KL
    advantages = {}
    for at in ("eos", "next"):
        steps = steps_mask(MASK, at)
        rewards = shaped_rewards(scores, kl, steps, kl_coef=0.5)
        for b, (start, end) in enumerate(SPANS):
            last = end - 1 + (at == "next" and end - start < 8)
            for t in range(9):
                expected = -0.5 * kl[b, t].item() * (start <= t < end) + scores[b].item() * (end > start and t == last)
                assert rewards[b, t].item() == pytest.approx(expected, abs=1e-6)
        advantages[at], returns = gae(rewards, values, steps, 1.0, lam)
        assert not advantages[at][~steps].any() and not returns[~steps].any()
        if at == "next":
            assert returns[0, 6] == scores[0] and returns[2, 5] == scores[2]  # what the value of the extra step is trained on
    for b, (start, end) in enumerate(SPANS):
        for t in range(start, end):
            later = (1 - lam) * lam ** (end - 1 - t) * (values[b, end] - scores[b]).item() if end - start < 8 else 0.0
            assert (advantages["next"] - advantages["eos"])[b, t].item() == pytest.approx(later, abs=1e-5)


# -- advantages

@pytest.mark.case(31)
@pytest.mark.parametrize("variance", ["population", "sample"])
def test_whitening_divides_by_the_variance_it_names_over_all_ranks(variance):
    torch.manual_seed(1)
    x = torch.randn(2, 4, 9) * 5 + 3  # rank, reply, token
    masks = torch.stack([MASK, responses((0, 3), (0, 0), (0, 0), (5, 6))])
    inside = x[masks].numpy().astype(np.float64)
    expected = (inside - inside.mean()) / inside.std(ddof=variance == "sample")
    got = torch.stack(on_ranks(2, lambda rank, all_sum: whiten(x[rank], masks[rank], all_sum, variance)))
    assert got[masks].tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5) and not got[~masks].any()
    for few in (responses((2, 3)), responses((0, 0))):  # one token, none: no variance to divide by
        assert not whiten(torch.full((1, 9), 7.0), few, variance=variance).any()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_variance_is_that_of_all_tokens_of_all_ranks(ranks):
    torch.manual_seed(3)
    x = torch.randn(ranks, 4, 9) * 5 + torch.arange(ranks)[:, None, None] * 4 + 3  # the ranks' means differ
    masks = torch.stack([MASK.roll(rank, 0) if rank != 1 else responses((0, 3), (0, 0), (0, 0), (5, 6)) for rank in range(ranks)])
    found = on_ranks(ranks, lambda rank, all_sum: variance(x[rank], masks[rank], all_sum).item())
    assert len(set(found)) == 1 and found[0] == pytest.approx(torch.var(x[masks].double(), correction=0).item(), rel=1e-5)
    shuffled = torch.where(masks, x, 1e4 * torch.randn(x.shape))  # what padding holds doesn't count
    assert on_ranks(ranks, lambda rank, all_sum: variance(shuffled[rank], masks[rank], all_sum).item()) == pytest.approx(found)


@pytest.mark.case(31)
def test_variance_of_one_token_and_of_equal_ones_is_zero():
    for mask in (responses((2, 3)), responses((0, 9))):
        assert variance(torch.full((1, 9), 7.0), mask).item() == 0


# -- losses

@pytest.mark.parametrize("kind, clip, dual_clip, penalty_coef", [("clip", 0.2, 0.0, 9.0), ("clip", 0.2, 1.5, 9.0), ("clip", 0.5, 3.0, 9.0),
                                                                 ("penalty", 0.2, 0.0, 0.7), ("penalty", 0.1, 0.0, 0.0)])
def test_policy_losses_equal_a_loop_over_tokens_whatever_padding_holds(kind, clip, dual_clip, penalty_coef):
    torch.manual_seed(2)
    logprobs, old, advantages = torch.randn(3, 4, 9)
    total = clipped = kl = bounded = 0
    for b, t in MASK.nonzero().tolist():
        ratio, A = math.exp(logprobs[b, t] - old[b, t]), advantages[b, t].item()
        loss = -ratio * A + penalty_coef * (ratio - 1 - math.log(ratio))
        if kind == "clip":
            loss = -min(ratio * A, min(max(ratio, 1 - clip), 1 + clip) * A)
            if dual_clip and A < 0:
                bounded += loss > -dual_clip * A
                loss = min(loss, -dual_clip * A)
        total, clipped, kl = total + loss, clipped + (abs(ratio - 1) > clip), kl + ratio - 1 - math.log(ratio)
    assert bool(bounded) == bool(dual_clip)
    for padding in (0.0, 50.0, -1e4):
        noisy = torch.where(MASK, logprobs, padding)
        loss, stats = policy_loss(noisy, old, advantages, MASK, clip, 13, kind, dual_clip, penalty_coef)
        assert (loss.item(), stats["clip_fraction"].item(), stats["approx_kl"].item()) == pytest.approx((total / 13, clipped / 13, kl / 13), rel=1e-4)


@pytest.mark.parametrize("advantage, ratio, flows", [(-1, 4.0, False), (-1, 2.0, True), (1, 1.1, True), (1, 4.0, False)])
def test_dual_clip_stops_the_gradient_of_a_bad_token_that_became_far_likelier(advantage, ratio, flows):
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.bool)
    policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[float(advantage)]]), one, 0.2, 1, dual_clip=3.0)[0].backward()
    assert (logprobs.grad.item() != 0) == flows


LOGITS = torch.tensor([[1.0, 0.2, -0.7, 0.4, -1.5, 0.9], [0.1, 0.8, 0.3, -0.4, 0.5, -0.2], [-0.6, 0.5, 1.1, 0.0, 0.7, -0.9]], dtype=torch.float64)
ONE = torch.ones(1, 1, dtype=torch.bool)


def kl_between(p, q):
    return (p.exp() * (p - q)).sum()


def expectation(drawn_from, value):
    """Sum over six actions of their probability times value(action): exact."""
    return sum(p * value(a) for a, p in enumerate(drawn_from.exp()))


@pytest.mark.parametrize("off_policy", [False, True])
def test_gradient_of_each_kl_estimator_in_the_loss_by_enumeration(off_policy):
    """k2 and k3 give grad KL(pi || ref) exactly, also where the tokens were drawn from an older policy; k1 gives zero on average."""
    logits, log_ref = LOGITS[0].clone().requires_grad_(), LOGITS[1].log_softmax(-1)
    log_pi = logits.log_softmax(-1)
    log_old = LOGITS[2].log_softmax(-1) if off_policy else log_pi.detach()
    true, = torch.autograd.grad(kl_between(log_pi, log_ref), logits, retain_graph=True)

    def loss(kind):
        return expectation(log_old, lambda a: kl_loss(log_pi[a].view(1, 1), log_old[a].view(1, 1), log_ref[a].view(1, 1), ONE, kind, 1))

    for kind in ("k2", "k3"):
        torch.testing.assert_close(torch.autograd.grad(loss(kind), logits, retain_graph=True)[0], true)
    torch.testing.assert_close(loss("k3"), kl_between(log_pi, log_ref))
    k1, = torch.autograd.grad(loss("k1"), logits, retain_graph=True)
    if not off_policy:
        torch.testing.assert_close(k1, torch.zeros(6, dtype=torch.float64))
        torch.testing.assert_close(loss("k1"), kl_between(log_pi, log_ref))
    assert (k1 - true).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_loss_is_a_sum_over_reply_tokens_divided_by_the_count_given(kind):
    torch.manual_seed(3)
    logprobs, old, ref = torch.randn(3, 4, 9) * MASK
    weight = torch.ones(4, 9) if kind == "k1" else (logprobs - old).exp()
    expected = sum((weight * kl_estimate(logprobs, ref, kind))[b, t].item() for b, t in MASK.nonzero().tolist()) / 20
    assert kl_loss(logprobs, old, ref, MASK, kind, 20).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_of_the_penalty_is_that_of_the_kl_from_the_old_policy_by_enumeration():
    logits, log_old = LOGITS[0].clone().requires_grad_(), LOGITS[1].log_softmax(-1)
    log_pi, zero = logits.log_softmax(-1), torch.zeros(1, 1, dtype=torch.float64)
    true, = torch.autograd.grad(0.7 * kl_between(log_old, log_pi), logits, retain_graph=True)
    loss = expectation(log_old, lambda a: policy_loss(log_pi[a].view(1, 1), log_old[a].view(1, 1), zero, ONE, 0.2, 1, "penalty", 0.0, 0.7)[0])
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], true)
    torch.testing.assert_close(loss, 0.7 * kl_between(log_old, log_pi.detach()), check_dtype=False)


@pytest.mark.parametrize("clip", [0.0, 0.3, 1e9])
def test_value_loss_equals_a_loop_and_clip_0_is_the_plain_squared_error(clip):
    torch.manual_seed(4)
    values, old, returns = torch.randn(3, 4, 9)
    total = outside = 0
    for b, t in MASK.nonzero().tolist():
        v, o, r = values[b, t].item(), old[b, t].item(), returns[b, t].item()
        held = min(max(v, o - clip), o + clip) if clip else v
        total, outside = total + 0.5 * max((v - r) ** 2, (held - r) ** 2), outside + (clip > 0 and abs(v - o) > clip)
    loss, stats = value_loss(values, old, returns, MASK, clip, 13)
    assert loss.item() == pytest.approx(total / 13, rel=1e-5)
    assert {name: value.item() for name, value in stats.items()} == ({"value_clip_fraction": pytest.approx(outside / 13)} if clip else {})


# -- control

def test_the_penalty_doubles_halves_or_stays():
    kls = {0.0: 0.5, 0.0666: 0.5, 0.0667: 1, 0.1: 1, 0.1499: 1, 0.1501: 2, 5.0: 2}
    assert {kl: adapt_penalty(3.0, kl, target=0.1) / 3 for kl in kls} == kls


def test_learning_rates_warm_up_and_follow_their_schedule():
    peak, warmup, steps = 0.8, 4, 14
    for step in range(steps):
        share = (step - warmup) / (steps - warmup)
        expected = {"cosine": peak * (0.55 + 0.45 * math.cos(math.pi * share)), "linear": peak * (1 - share), "constant": peak}
        for schedule, value in expected.items():
            value = peak * (step + 1) / warmup if step < warmup else value
            assert scheduled_lr(step, steps, warmup, peak, schedule) == pytest.approx(value), (schedule, step)
    assert scheduled_lr(5, 14, 4, 0.8) == scheduled_lr(5, 14, 4, 0.8, "cosine")
    assert scheduled_lr(0, 1, 1, 0.8, "linear") == 0.8  # a run that is all warm-up


def history(rollouts=20, **changed):
    """Rows of metrics of a healthy run; changed: {metric: its value as a function of the rollout's number}."""
    healthy = {"kl": lambda i: min(6, 0.3 * i), "explained_variance": lambda i: 0.7 - 1 / (i + 1), "eos_rate": lambda i: 0.95 + 0.01 * (i % 3),
               "entropy": lambda i: 0.5 + 1 / (i + 1), "score": lambda i: 0.1 * i, "gold": lambda i: min(0.9, 0.08 * i) - 0.05 * (i % 2)}
    return [{name: value(i) for name, value in (healthy | changed).items()} for i in range(rollouts)]


def test_a_healthy_run_shows_no_symptom_however_long():
    for rollouts in (1, 5, 10, 15, 20, 40):
        assert diagnose(history(rollouts), 20, ["gold"]) == {}
    assert diagnose(history(gold=lambda i: 0.8 - 0.05 * i, score=lambda i: -0.1 * i), 20, ["gold"]) == {}  # both fall: no over-optimisation
    assert diagnose(history(explained_variance=lambda i: -1.0 if i < 18 else 0.1), 20) == {}  # the critic has got there
    too_early = history(9, explained_variance=lambda i: -1.0, eos_rate=lambda i: 1 - 0.1 * i, entropy=lambda i: 0.1**i)
    assert diagnose(too_early, 20) == {}
    without_gold = [{k: v for k, v in row.items() if k != "gold"} for row in history()]
    assert diagnose(without_gold, 20) == {}


@pytest.mark.case(17)
@pytest.mark.parametrize("symptom, changed", [
    ("kl", {"kl": lambda i: 20.1 if i == 19 else 5.0}),
    ("critic", {"explained_variance": lambda i: 0.5 if i < 10 else -0.1}),
    ("eos", {"eos_rate": lambda i: 0.95 - 0.01 * i}),
    ("entropy", {"entropy": lambda i: 2.0 * 0.8**i}),
    ("gold", {"gold": lambda i: 0.08 * i if i < 10 else 0.8 - 0.06 * (i - 10)}),
])
def test_each_symptom_is_found_alone_and_its_advice_names_a_switch(symptom, changed):
    found = diagnose(history(**changed), 20, ["gold"])
    assert found.keys() == {symptom} and "--" in found[symptom] and "\n" not in found[symptom]


# -- whole runs, and what they compute

WORDS = ("river", "stone", "apple", "window", "garden", "pencil", "candle", "bridge")
RUN = ("--model {root}/sft --data {root}/prompts.json --threads 1 --rollout-batch 16 --minibatches 2 --max-new-tokens 10 --steps 2 "
       "--warmup 1 --lr 0.005 --critic-lr 0.005")
PTX = "--ptx-data {root}/demonstrations.json --ptx-tokens 100"
RECORDED = ("generate", "missing_eos_scores", "update_moments", "normalise_scores", "steps_mask", "shaped_rewards", "gae", "whiten", "policy_loss",
            "kl_loss", "value_loss", "adapt_kl_coef", "adapt_penalty", "diagnose")


@contextlib.contextmanager
def quietly():
    """Catches what a run says; gives back the signal handlers that it takes."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            yield said
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def main(script, words):
    """Run a script in this process; what it locks is free again at the end."""
    try:
        script.main(parse_flags(script.Config, "", words))
    finally:
        if runtime.Run.current and runtime.Run.current.lock:
            runtime.Run.current.lock.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with prompts, demonstrations, a policy whose replies end sometimes, and two reward models."""
    root = tmp_path_factory.mktemp("ppo")
    prompts = [f"Say {'please ' * (i % 3)}{word}." for i, word in enumerate(WORDS)]
    files = {"prompts": [{"prompt": p} for p in prompts],
             "demonstrations": [{"instruction": p, "output": reply} for p in prompts for reply in ("It is good.", "No.", "It is sad, and so it is.")],
             "pairs": [{"prompt": p, "chosen": "It is good.", "rejected": "No."} for p in prompts]}
    for name, rows in files.items():
        (root / f"{name}.json").write_text(json.dumps(rows))

    def stage(script, flags):
        main(script, shlex.split(flags.format(root=root) + " --threads 1 --val-fraction 0 --batch-tokens 512"))

    with quietly():
        stage(sft, "--layers 1 --heads 2 --width 32 --block-size 64 " f"--tokenizer {TOY}" " --data {root}/demonstrations.json --steps 40 --warmup 5 --lr 0.02 "
              "--out {root}/sft")
        for name, seed in (("reward", 0), ("other", 1)):
            stage(reward, f"--data {{root}}/pairs.json --model {{root}}/sft --steps 2 --seed {seed} --out {{root}}/{name}")
    return root


def copied(value):
    """A copy that the run can't change: of tensors, and of tuples, lists and dicts of them."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Generation):
        return Generation(*map(copied, value))
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    return type(value)(map(copied, value)) if type(value) in (tuple, list) else value


def train(root, out, *flags, reward="--reward {root}/reward"):
    """A run of ppo.main with everything it computes.

    rows: its metrics, without timings; said: what it printed; calls[name]: the arguments and results of ppo.py's functions, with the
    numbers of the rollout and the minibatch (from 0); start: weights before training; steps: every optimiser step with its network,
    learning rate, gradient and the weights before and after.
    """
    run = SimpleNamespace(calls={name: [] for name in RECORDED}, start={}, steps=[], out=out)
    trained = {}  # optimiser: name and network

    def record(function):
        signature = inspect.signature(function)

        def recorded(*args, **options):
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            call = SimpleNamespace(**copied(bound.arguments), rollout=len(run.calls["generate"]) - 1, minibatch=len(steps_of(run, "critic")))
            result = function(*args, **options)
            call.result = copied(result)
            run.calls[function.__name__].append(call)
            return result
        return recorded

    def adamw(network, *args, **options):
        optimizer, name = steps_file.adamw(network, *args, **options), "policy" if isinstance(network, GPT) else "critic"
        trained[optimizer], run.start[name] = (name, network), copied(dict(network.state_dict()))
        return optimizer

    def optimizer_step(self, optimizer, lr, max_grad_norm, batch):
        name, network = trained[optimizer]
        gradient = {key: copied(p.grad) for key, p in network.named_parameters()}
        before = copied(dict(network.state_dict()))
        norm = original_step(self, optimizer, lr, max_grad_norm, batch)
        run.steps.append(SimpleNamespace(of=name, rollout=len(run.calls["generate"]) - 1, lr=lr, gradient=gradient, before=before, batch=batch,
                                         after=copied(dict(network.state_dict()))))
        return norm

    words = shlex.split(" ".join([RUN, reward, *flags, f"--out {out}"]).format(root=root))
    with quietly() as said, pytest.MonkeyPatch.context() as patch:
        original_step = runtime.Run.optimizer_step
        patch.setattr(runtime.Run, "optimizer_step", optimizer_step)
        patch.setattr(ppo, "adamw", adamw)
        for name in RECORDED:
            owner = rollout_file if name == "generate" else ppo
            patch.setattr(owner, name, record(getattr(owner, name)))
        main(ppo, words)
    run.said, run.rows = said.getvalue(), tools.metrics(out) if (out / "metrics.jsonl").exists() else []
    return run


def steps_of(run, name):
    return [step for step in run.steps if step.of == name]


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


def scores_by_hand(folder, rollout):
    """Each reply alone, without padding, through a reward model."""
    scorer = network(ScalarModel, folder)
    with torch.no_grad():
        return torch.stack([scorer(ids[:length][None])[0, -1] for ids, length in zip(rollout.ids, rollout.lengths)])


def in_training_order(run, values, rollout=0):
    """Rows (B, ...) of a rollout as a minibatch of all of them has them: by length, then by number."""
    size = run.calls["steps_mask"][rollout].result.long()
    ends = (size * torch.arange(1, size.shape[1] + 1)).amax(1).tolist()
    return values[sorted(range(len(ends)), key=lambda i: (ends[i], i))]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def default(root, tmp_path_factory):
    """A run with every switch at its default; some of its replies end, some are cut off."""
    run = train(root, tmp_path_factory.mktemp("default") / "run")
    ended = torch.cat([rollout_of(run, i).ended for i in (0, 1)])
    assert ended.any() and not ended.all()
    return run


# -- the score: several rewards, functions, missing end tokens, normalisation

def test_the_score_is_the_weighted_sum_of_reward_models_and_functions(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(length=lambda prompts, replies: [len(reply) for reply in replies]))
    run = train(root, tmp_path / "run", reward="--reward {root}/reward {root}/other --reward-fn mine:length --reward-weights 0.5 -2 3")
    for number, row in enumerate(run.rows):
        rollout = rollout_of(run, number)
        texts = rollout.texts(load_model(root / "sft", GPT)[1])
        parts = [scores_by_hand(root / "reward", rollout), scores_by_hand(root / "other", rollout), torch.tensor([float(len(text)) for text in texts])]
        expected = 0.5 * parts[0] - 2 * parts[1] + 3 * parts[2]
        torch.testing.assert_close(run.calls["missing_eos_scores"][number].scores, expected, rtol=1e-4, atol=1e-4)
        logged = [row["score_reward"], row["score_other"], row["score_mine:length"]]
        assert logged == pytest.approx([part.mean().item() for part in parts], rel=1e-4)
        assert row["score"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert same(run.start["critic"], network(ScalarModel, root / "reward").state_dict())  # the critic starts as the first of them


def test_rewards_weigh_1_each_unless_told(root, tmp_path, default):
    both = train(root, tmp_path / "both", "--steps 1", reward="--reward {root}/reward {root}/other")
    expected = sum(scores_by_hand(root / name, rollout_of(both)) for name in ("reward", "other"))
    torch.testing.assert_close(both.calls["missing_eos_scores"][0].scores, expected, rtol=1e-4, atol=1e-4)
    assert not any(name.startswith("score_") and not name.endswith(("_share", "_per_second")) for name in default.rows[0])


def test_sources_are_named_by_as_much_of_their_path_as_tells_them_apart():
    assert short_names(["runs/reward", "runs/other/", "mine:brief"]) == ["reward", "other", "mine:brief"]
    assert short_names(["a/sft", "b/sft", "c/x/sft"]) == ["a/sft", "b/sft", "x/sft"]
    assert short_names(["sft", "b/sft"]) == ["sft", "b/sft"]
    assert short_names(["a/sft", "a/sft", "a/ppo"]) == ["a/sft#1", "a/sft#2", "ppo"]


def test_a_reward_function_gets_prompts_and_replies_as_text_in_order(root, tmp_path, monkeypatch):
    """It is found from the working directory; its numbers are the scores."""
    (tmp_path / "brevity_of_mine.py").write_text("calls = []\n\ndef score(prompts, replies):\n    calls.append((prompts, replies))\n"
                                                 "    return [i / 7 for i in range(len(replies))]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    run = train(root, tmp_path / "run", reward="--reward-fn brevity_of_mine:score")
    trial, *calls = sys.modules.pop("brevity_of_mine").calls
    assert len(trial[0]) == len(trial[1]) == 1 and len(calls) == 2
    _, tokenizer = load_model(root / "sft", GPT)
    for number, (prompts, replies) in enumerate(calls):
        rollout = rollout_of(run, number)
        assert type(prompts) is type(replies) is list and len(prompts) == 16 and len(set(prompts)) > 4
        for i, (ids, mask) in enumerate(zip(rollout.ids, rollout.mask)):
            assert prompts[i] == tokenizer.decode(ids[:mask.nonzero()[0]].tolist()) and replies[i] == tokenizer.decode(ids[mask].tolist())
        assert run.calls["missing_eos_scores"][number].scores.tolist() == pytest.approx([i / 7 for i in range(16)])


def test_a_reward_function_of_three_parameters_gets_the_answers_of_its_rows(root, tmp_path, monkeypatch):
    """Rows with a checkable result: a question, and an answer that ends in #### and the result."""
    (tmp_path / "questions.json").write_text(json.dumps([{"question": f"How many are {n}?", "answer": f"{n} it is #### {n},000"} for n in range(20)]))
    (tmp_path / "checks_of_mine.py").write_text("calls = []\n\ndef score(prompts, replies, answers):\n    calls.append((prompts, answers))\n"
                                                "    return [float(answer in reply) for reply, answer in zip(replies, answers)]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    train(root, tmp_path / "run", f"--data {tmp_path}/questions.json", reward="--reward-fn checks_of_mine:score")
    trial, *calls = sys.modules.pop("checks_of_mine").calls
    assert len(trial[1]) == 1 and len(calls) == 2
    assert all(answers == [prompt.split()[-1][:-1] + "000" for prompt in prompts] for prompts, answers in calls)


def test_a_reward_function_that_fails_later_ends_in_one_line_and_saves_nothing(root, tmp_path, monkeypatch):
    def moody(prompts, replies):
        return [1.0] if len(replies) == 1 else 1 / 0

    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(moody=moody))
    with pytest.raises(UserError, match="mine:moody failed .ZeroDivisionError: division by zero."):
        train(root, tmp_path / "run", reward="--reward {root}/reward --reward-fn mine:moody")
    assert not (tmp_path / "run" / "model.safetensors").exists()


GRADERS = """
calls = []

def least(prompts, replies, least=3):
    calls.append(least)
    return [float(len(reply) >= least) for reply in replies]

def by_name(answers, replies):
    calls.append(list(answers))
    return [float(answer in reply) for reply, answer in zip(replies, answers)]

def everything(replies, **texts):
    calls.append(sorted(texts))
    return [0.0] * len(replies)

def perhaps(replies, answers=None):
    calls.append(list(answers))
    return [0.0] * len(replies)
"""


@pytest.mark.parametrize("name, given", [("least", 3), ("by_name", ["7"]), ("everything", ["answers", "ended", "prompts"]), ("perhaps", ["7"])])
def test_a_reward_function_gets_what_its_parameters_name_whatever_their_number(name, given, tmp_path, monkeypatch):
    (tmp_path / "graders.py").write_text(GRADERS)
    monkeypatch.syspath_prepend(tmp_path)
    function = judges.Function("--reward-fn", f"graders:{name}")
    function(["What?"], ["The 7."], ["7"], [True])
    assert sys.modules.pop("graders").calls == [given] and function.wants_answers == (name == "by_name")


@pytest.mark.parametrize("name, answers, said", [("by_name", 0, "--reward-fn graders:by_name wants answers, and no row has one"),
                                                 ("perhaps", 0, ""), ("by_name", 3, "warning: 13 of 16 prompts have no answer; ")])
def test_a_function_that_wants_answers_and_gets_none_stops_the_run_and_one_that_gets_some_is_told(name, answers, said, root, tmp_path, monkeypatch, capsys):
    (tmp_path / "graders.py").write_text(GRADERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    rows = [{"prompt": f"Say {i}."} | ({"answer": str(i)} if i >= 16 - answers else {}) for i in range(16)]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    words = f"{RUN} --steps 1 --data {tmp_path}/prompts.json --reward-fn graders:{name} --out {tmp_path}/run".format(root=root)
    code = tools_code(ppo, words)
    calls = sys.modules.pop("graders").calls
    # The trial before the run is of a prompt that has an answer, if there is one.
    assert calls[:1] == ([["13"]] if answers else [[""]] if code == 0 else [])
    captured = capsys.readouterr()
    assert code == (2 if "wants" in said else 0) and said in captured.out + captured.err
    assert (tmp_path / "run").exists() == (code == 0)


def tools_code(module, words):
    """The exit code of a script's run in this process."""
    try:
        runtime.run_script(module.main, module.Config, "", shlex.split(words))
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.mark.parametrize("rule", ["floor", "replace", "subtract"])
def test_the_missing_end_token_is_judged_before_scores_are_normalised(rule, root, tmp_path):
    run = train(root, tmp_path / "run", f"--missing-eos {rule} --missing-eos-penalty 0.7 --reward-norm standard --steps 1")
    rollout = rollout_of(run)
    scores = scores_by_hand(root / "reward", rollout)
    cut_off = {"floor": scores.min() - 0.7, "replace": torch.tensor(-0.7), "subtract": scores - 0.7}[rule]
    judged = torch.where(rollout.ended, scores, cut_off)
    assert not rollout.ended.all()
    torch.testing.assert_close(run.calls["normalise_scores"][0].scores, judged, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run.calls["shaped_rewards"][0].scores, (judged - judged.mean()) / judged.std(), rtol=1e-3, atol=1e-3)
    assert run.rows[0]["score"] == pytest.approx(scores.mean().item(), abs=1e-4)  # what is logged is the reward model's own


@pytest.mark.parametrize("kind", ["none", "scale", "standard"])
def test_scores_are_normalised_by_the_moments_of_all_rollouts_so_far(kind, root, tmp_path):
    run = train(root, tmp_path / "run", f"--reward-norm {kind} --steps 3")
    judged = [call.scores for call in run.calls["normalise_scores"]]
    for number, call in enumerate(run.calls["shaped_rewards"]):
        seen = torch.cat(judged[:number + 1])
        expected = {"none": judged[number], "scale": judged[number] / seen.std(), "standard": (judged[number] - seen.mean()) / seen.std()}[kind]
        torch.testing.assert_close(call.scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flags", ["--reward-clip 0.5", "--reward-clip 0.8 --reward-norm scale"])
def test_scores_are_clipped_after_they_are_normalised(flags, root, tmp_path):
    clip = float(flags.split()[1])
    run = train(root, tmp_path / "run", flags, "--steps 1")
    call = run.calls["normalise_scores"][0]
    scores = call.scores / call.scores.std() if "scale" in flags else call.scores
    assert scores.abs().max() > clip and scores.abs().min() < clip
    torch.testing.assert_close(run.calls["shaped_rewards"][0].scores, scores.clamp(-clip, clip), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("written", [False, True])
def test_the_score_counts_one_position_later_for_all_but_the_longest_replies(written, root, tmp_path, monkeypatch):
    """Replies as they are sampled; or written so that one of those that aren't the longest ends, behind a long prompt, in the last column."""
    def generate(policy, prompts, max_new_tokens, tokenizer, *options, **more):
        ids, lengths = pad_rows([prompt + prompt[1:4 + (len(prompt) < max(map(len, prompts)))] for prompt in prompts], tokenizer.pad)
        at = torch.arange(ids.shape[1])
        mask = (at >= torch.tensor([len(prompt) for prompt in prompts])[:, None]) & (at < lengths[:, None])
        return Generation(ids, mask, lengths, torch.ones(len(prompts), dtype=torch.bool))

    if written:
        monkeypatch.setattr(rollout_file, "generate", generate)
    run = train(root, tmp_path / "run", "--reward-at next --steps 1 --minibatches 1 --micro-batch-tokens 60")
    rollout, advantages, critic = rollout_of(run), run.calls["gae"][0], network(ScalarModel, root / "reward")
    size, width = rollout.mask.sum(1), advantages.steps.shape[1]
    later = size < size.max()
    assert later.any() and not later.all() and (not written or (rollout.lengths[later] == rollout.ids.shape[1]).any())
    for b, length in enumerate(rollout.lengths.tolist()):
        inside, last = rollout.mask[b].nonzero().flatten().tolist(), length - 1 + int(later[b])
        assert advantages.steps[b].nonzero().flatten().tolist() == sorted({*inside, last})
        with torch.no_grad():
            heads = critic(rollout.ids[b, :length][None])[0]
        assert advantages.values[b, last].item() == pytest.approx(heads[last - 1].item(), abs=1e-4)  # the state after the last token
        expected = torch.zeros(width).index_fill(0, torch.tensor(last), run.calls["shaped_rewards"][0].scores[b].item())
        torch.testing.assert_close(advantages.rewards[b], expected)  # policy and reference agree: no KL yet
    whitened = run.calls["whiten"][0].mask
    assert torch.equal(whitened[:, :rollout.mask.shape[1]], rollout.mask) and whitened.sum() == size.sum()
    for name, counted in (("policy_loss", size.sum()), ("value_loss", advantages.steps.sum())):
        calls = [call for call in run.calls[name] if call.minibatch == 0]
        assert sum((call.mask if name == "policy_loss" else call.steps).sum() for call in calls) == counted
        assert {call.tokens.item() for call in calls} == {counted.item()}


# -- the KL term

@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("place", ["reward", "loss"])
def test_the_kl_term_stands_where_it_is_told_and_a_wrong_gradient_is_warned_of(kind, place, root, tmp_path):
    run = train(root, tmp_path / "run", f"--kl {kind} --kl-in {place} --kl-coef 0.3")
    rollout, shaped = rollout_of(run, 1), run.calls["shaped_rewards"][1]
    with torch.no_grad():
        ref, _ = reply_tokens(network(GPT, root / "sft"), rollout.ids, rollout.mask)
        old, _ = reply_tokens(network(GPT, root / "sft", steps_of(run, "policy")[3].after), rollout.ids, rollout.mask)
    log_ratio = old - ref
    expected = {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": (-log_ratio).exp() - 1 + log_ratio}[kind]
    assert log_ratio.abs().max() > 0.01
    torch.testing.assert_close(shaped.kl[rollout.mask], expected, rtol=1e-3, atol=1e-5)
    assert shaped.kl_coef == (0.3 if place == "reward" else 0)
    assert torch.equal(run.calls["gae"][1].rewards, shaped.result)
    assert {call.kind for call in run.calls["kl_loss"]} == ({kind} if place == "loss" else set())
    assert ("kl_loss" in run.rows[1]) == (place == "loss")
    right = (kind == "k1") == (place == "reward")
    assert ("has the wrong gradient" in run.said) == (not right)


def test_no_gradient_is_wrong_when_there_is_no_kl_term(root, tmp_path):
    assert "has the wrong gradient" not in train(root, tmp_path / "run", "--kl k3 --kl-coef 0 --steps 1").said


def test_beta_adapts_to_the_kl_of_each_rollout_and_is_used_in_the_next(root, tmp_path):
    run = train(root, tmp_path / "run", "--kl-coef 0.3 --kl-target 0.05 --kl-horizon 40 --steps 4")
    coef = 0.3
    for row, shaped in zip(run.rows, run.calls["shaped_rewards"]):
        assert row["kl_coef"] == pytest.approx(coef) and shaped.kl_coef == pytest.approx(coef)
        coef = adapt_kl_coef(coef, row["kl"], target=0.05, replies=16, horizon=40)
    assert len({row["kl_coef"] for row in run.rows}) == 4
    assert [call.kl for call in run.calls["adapt_kl_coef"]] == [row["kl"] for row in run.rows]
    constant = train(root, tmp_path / "constant", "--kl-coef 0.3 --steps 3")
    assert {row["kl_coef"] for row in constant.rows} == {0.3}


# -- advantages

def test_gamma_and_lambda_reach_the_advantages(root, tmp_path, default):
    run = train(root, tmp_path / "run", "--gamma 0.9 --lam 0.3 --steps 1")
    assert (run.calls["gae"][0].gamma, run.calls["gae"][0].lam) == (0.9, 0.3)
    assert (default.calls["gae"][0].gamma, default.calls["gae"][0].lam) == (1.0, 0.95)
    assert torch.equal(run.calls["whiten"][0].x, run.calls["gae"][0].result[0])
    assert torch.equal(run.calls["value_loss"][0].old_values, in_first_minibatch(run, run.calls["gae"][0].values))
    assert torch.equal(run.calls["value_loss"][0].returns, in_first_minibatch(run, run.calls["gae"][0].result[1]))


def in_first_minibatch(run, values):
    """Rows of values that belong to the first minibatch, found by their old values (which no two rows share)."""
    first = run.calls["value_loss"][0].old_values
    whole = run.calls["gae"][0].values[:, :first.shape[1]]
    return values[[next(i for i, row in enumerate(whole) if torch.equal(row, wanted)) for wanted in first], :first.shape[1]]


@pytest.mark.parametrize("kind", ["population", "sample", "none"])
@pytest.mark.parametrize("clip", [0, 0.5])
def test_advantages_are_whitened_over_the_rollout_and_then_clipped(kind, clip, root, tmp_path):
    run = train(root, tmp_path / "run", f"--whiten {kind} --advantage-clip {clip} --steps 1 --minibatches 1 --micro-batch-tokens 10000")
    mask, (advantages, returns) = rollout_of(run).mask, run.calls["gae"][0].result
    inside = advantages[mask].double()
    if kind != "none":
        inside = (inside - inside.mean()) / inside.std(correction=kind == "sample")
    expected = torch.zeros(mask.shape).masked_scatter(mask, (inside.clamp(-clip, clip) if clip else inside).float())
    assert inside.abs().max() > 0.6
    for call in run.calls["policy_loss"]:
        torch.testing.assert_close(call.advantages, in_training_order(run, expected), rtol=1e-5, atol=1e-5)
    assert torch.equal(run.calls["value_loss"][0].returns, in_training_order(run, returns))  # the critic learns what was not whitened


# -- the objective: the gradient of a whole run against the formula written out

def clipped(q, clip=0.2):
    return -torch.minimum(q.ratio * q.advantages, q.ratio.clamp(1 - clip, 1 + clip) * q.advantages)


def kl_term(kind):
    return {"k1": lambda q: clipped(q) + 0.4 * q.log_ratio, "k2": lambda q: clipped(q) + 0.4 * q.ratio.detach() * q.log_ratio**2 / 2,
            "k3": lambda q: clipped(q) + 0.4 * q.ratio * ((-q.log_ratio).exp() - 1 + q.log_ratio)}[kind]


OBJECTIVES = {
    "": clipped,
    "--clip 0.05": lambda q: clipped(q, 0.05),
    "--dual-clip 1.01": lambda q: torch.where(q.advantages < 0, torch.minimum(clipped(q), -1.01 * q.advantages), clipped(q)),
    "--policy-loss penalty --penalty-coef 0.7": lambda q: -q.ratio * q.advantages + 0.7 * (q.ratio - 1 - q.ratio.log()),
    "--entropy-coef 0.3": lambda q: clipped(q) - 0.3 * q.entropy,
    "--kl-in loss --kl k1 --kl-coef 0.4": kl_term("k1"),
    "--kl-in loss --kl k2 --kl-coef 0.4": kl_term("k2"),
    "--kl-in loss --kl k3 --kl-coef 0.4": kl_term("k3"),
    "--kl-in loss --kl k2 --kl-coef 0.5 --kl-target 5 --kl-horizon 16": kl_term("k2"),  # 0.4 in the second rollout, as the first has no KL
    "--ptx-coef 0.5 " + PTX: lambda q: clipped(q) - 0.5 * q.ptx,
}


def ptx_logprobs(root, policy, number, budget=100):
    """Log-probabilities (n,) of the reply tokens in the minibatch's batch of demonstrations."""
    _, tokenizer = load_model(root / "sft", GPT)
    examples = [encode_group(tokenizer, row)[0] for row in read_rows(root / "demonstrations.json", "demonstrations", str)]
    batch = next(itertools.islice(endless_batches([len(ids) for ids, _ in examples], budget, 0), number, None))
    ids, mask, _ = collate([examples[i] for i in batch], tokenizer.pad, "cpu")
    return reply_tokens(policy, ids, mask)[0]


@pytest.mark.parametrize("flags", OBJECTIVES)
def test_the_policy_follows_the_gradient_of_the_objective_written_out(flags, root, tmp_path):
    """Second pass over the second rollout: the policy has left the old one, and the old one the reference. Advantages are the run's."""
    run = train(root, tmp_path / "run", flags, "--minibatches 1 --micro-batch-tokens 90 --temperature 0.8 --lr 0.02 --max-grad-norm 1e9")
    steps, rollout = steps_of(run, "policy"), rollout_of(run, 1)
    assert [step.rollout for step in steps] == [0, 0, 1, 1] and len(steps_of(run, "critic")) == 4
    policy = network(GPT, root / "sft", steps[3].before)
    with torch.no_grad():
        old, _ = reply_tokens(network(GPT, root / "sft", steps[2].before), rollout.ids, rollout.mask, 0.8)
        ref, _ = reply_tokens(network(GPT, root / "sft"), rollout.ids, rollout.mask, 0.8)
    logprobs, entropy = reply_tokens(policy, rollout.ids, rollout.mask, 0.8)
    advantages = run.calls["gae"][1].result[0][rollout.mask]
    q = SimpleNamespace(ratio=(logprobs - old).exp(), log_ratio=logprobs - ref, entropy=entropy, ptx=ptx_logprobs(root, policy, 3).mean(),
                        advantages=(advantages - advantages.mean()) / advantages.std(correction=0))
    objective, other = OBJECTIVES[flags](q), clipped(q) if flags else -q.ratio * q.advantages
    assert not torch.allclose(objective, other)  # what the flag is about happens here
    objective.mean().backward()
    for name, p in policy.named_parameters():
        torch.testing.assert_close(steps[3].gradient[name], p.grad, rtol=1e-3, atol=2e-6, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("flags, clip", [("", 2.0), ("--value-clip 0", 1e9), ("--value-clip 0.05", 0.05), ("--reward-at next --value-clip 0.05", 0.05)])
def test_the_critic_follows_the_gradient_of_the_value_loss_written_out(flags, clip, root, tmp_path):
    run = train(root, tmp_path / "run", flags, "--steps 1 --minibatches 1 --micro-batch-tokens 90 --max-grad-norm 1e9")
    steps, mask = steps_of(run, "critic"), run.calls["gae"][0].steps
    ids = F.pad(rollout_of(run).ids, (0, mask.shape[1] - rollout_of(run).ids.shape[1]))  # room for --reward-at next
    critic = network(ScalarModel, root / "reward", steps[1].before)
    with torch.no_grad():
        old = network(ScalarModel, root / "reward")(ids)[:, :-1][mask[:, 1:]]
    values, returns = critic(ids)[:, :-1][mask[:, 1:]], run.calls["gae"][0].result[1][mask]
    held = old + (values - old).clamp(-clip, clip)
    assert clip > 1 or ((values - old).abs() > clip).any()  # where it clips at all, the formula below says how
    (0.5 * torch.maximum((values - returns) ** 2, (held - returns) ** 2)).mean().backward()
    for name, p in critic.named_parameters():
        torch.testing.assert_close(steps[1].gradient[name], p.grad, rtol=1e-3, atol=1e-5, msg=lambda text: f"{name}: {text}")
    assert ("value_clip_fraction" in run.rows[0]) == (flags != "--value-clip 0")


def test_ptx_adds_its_gradient_before_the_one_step_of_each_minibatch(root, tmp_path):
    without = train(root, tmp_path / "without", "--max-grad-norm 1e9")
    run = train(root, tmp_path / "run", "--max-grad-norm 1e9 --ptx-coef 0.5", PTX)
    assert [len(steps_of(r, name)) for r in (run, without) for name in ("policy", "critic")] == [8] * 4  # 2 rollouts, 2 epochs, 2 minibatches
    policy = network(GPT, root / "sft")
    logprobs = ptx_logprobs(root, policy, 0)
    (-logprobs.mean()).backward()
    for name, p in policy.named_parameters():  # the first step of both runs starts at the same weights
        total, alone = steps_of(run, "policy")[0].gradient[name], steps_of(without, "policy")[0].gradient[name]
        torch.testing.assert_close(total, alone + 0.5 * p.grad, rtol=0, atol=1e-6)
    one = train(root, tmp_path / "one", "--steps 1 --epochs 1 --minibatches 1 --ptx-coef 3", PTX)
    assert one.rows[0]["ptx_loss"] == pytest.approx(-logprobs.mean().item(), rel=1e-4)  # nats per token, without the weight
    assert "ptx_loss" not in without.rows[0]


# -- networks, learning rates, averages

@pytest.mark.parametrize("init, reward", [("auto", True), ("auto", False), ("reward", True), ("sft", True), ("zero", True), ("sft", False)])
def test_the_critic_starts_as_it_is_told(init, reward, root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(zero=lambda prompts, replies: [0.0] * len(replies)))
    scored_by = "--reward {root}/reward" if reward else "--reward-fn mine:zero"
    run = train(root, tmp_path / "run", f"--critic-init {init} --steps 1 --seed 3", reward=scored_by)
    if init == "reward" or (init == "auto" and reward):
        expected = network(ScalarModel, root / "reward")
    else:
        torch.manual_seed(3)
        expected = ScalarModel.from_trunk(network(GPT, root / "sft"))
        if init != "sft":
            torch.nn.init.zeros_(expected.score.weight)
            assert not run.calls["gae"][0].values.any()
    assert same(run.start["critic"], expected.state_dict())
    assert not same(run.start["critic"], steps_of(run, "critic")[-1].after)


def test_critic_warmup_trains_the_critic_alone_for_its_rollouts(root, tmp_path):
    run = train(root, tmp_path / "run", "--critic-warmup 2 --steps 3 --ema 0.5 --ptx-coef 1 --entropy-coef 0.1", PTX)
    policy, critic = steps_of(run, "policy"), steps_of(run, "critic")
    assert [step.rollout for step in policy] == [2] * 4 and [step.rollout for step in critic] == [0] * 4 + [1] * 4 + [2] * 4
    assert same(policy[0].before, run.start["policy"]) and not same(policy[0].after, run.start["policy"])
    assert not same(critic[0].after, critic[0].before)
    first, second, third = run.rows
    for row in (first, second):
        assert row["kl"] == row["lr"] == row["grad_norm"] == 0 and row["value_loss"] > 0 and row["critic_lr"] > 0
        assert not {"policy_loss", "ptx_loss", "clip_fraction"} & row.keys()
    assert {"policy_loss", "ptx_loss", "clip_fraction"} <= third.keys() and third["lr"] > 0
    average = network(GPT, run.out / "ema").state_dict()
    for step in policy:  # the average moves with the policy's steps, not with the critic's
        run.start["policy"] = {k: 0.5 * v + 0.5 * step.after[k] for k, v in run.start["policy"].items()}
    assert all(torch.allclose(average[k], v, rtol=1e-5, atol=1e-6) for k, v in run.start["policy"].items())


def test_the_average_is_the_recursion_over_every_step_of_the_policy(root, tmp_path):
    run = train(root, tmp_path / "run", "--ema 0.8")
    average = run.start["policy"]
    for step in steps_of(run, "policy"):
        average = {k: 0.8 * v + 0.2 * step.after[k] for k, v in average.items()}
    saved = network(GPT, run.out / "ema").state_dict()
    for name, value in average.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-6)
    assert same(network(GPT, run.out).state_dict(), steps_of(run, "policy")[-1].after) and not same(saved, steps_of(run, "policy")[-1].after)
    train(root, run.out, "--overwrite")
    assert not list((run.out / "ema").iterdir())  # of the run that was replaced


@pytest.mark.parametrize("of, flag, peak", [("policy", "--lr-schedule", 0.005), ("critic", "--critic-lr-schedule", 0.003)])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_each_network_has_a_learning_rate_and_a_schedule_of_its_own(of, flag, peak, schedule, root, tmp_path):
    run = train(root, tmp_path / "run", f"{flag} {schedule} --critic-lr 0.003 --warmup 2 --steps 5")
    other, other_peak = ("critic", 0.003) if of == "policy" else ("policy", 0.005)
    for name, top, kind in ((of, peak, schedule), (other, other_peak, "cosine")):
        assert [step.lr for step in steps_of(run, name)] == [scheduled_lr(step.rollout, 5, 2, top, kind) for step in steps_of(run, name)]
        assert [row["lr" if name == "policy" else "critic_lr"] for row in run.rows] == [scheduled_lr(i, 5, 2, top, kind) for i in range(5)]


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
        assert len(steps) == far and same(steps[-1].after, steps_of(whole, name)[far - 1].after)
    assert same(network(GPT, run.out).state_dict(), steps_of(run, "policy")[-1].after)
    assert whole.rows[0]["updates"] == 6 and run.rows[0]["updates"] == far  # the minibatch that was too far made no step
    assert run.rows[0]["approx_kl"] == pytest.approx(sum(kls[:far + 1]) / (far + 1), rel=1e-4)  # means are over those looked at


def test_after_a_stopped_update_the_next_rollout_starts_with_clean_gradients(root, tmp_path):
    run = train(root, tmp_path / "run", "--kl-stop 1e-9 --minibatches 1 --max-grad-norm 1e9")
    policy, critic = steps_of(run, "policy"), steps_of(run, "critic")
    assert [step.rollout for step in policy] == [step.rollout for step in critic] == [0, 1]  # one step each: the second pass is too far
    plain = train(root, tmp_path / "plain", "--epochs 1 --minibatches 1 --max-grad-norm 1e9")
    assert same(policy[1].gradient, steps_of(plain, "policy")[1].gradient) and same(critic[1].gradient, steps_of(plain, "critic")[1].gradient)


@pytest.mark.parametrize("target, factor", [(1e-9, 2), (1e9, 0.5)])
def test_the_penalty_adapts_to_the_last_minibatch_and_is_used_in_the_next_rollout(target, factor, root, tmp_path):
    flags = f"--policy-loss penalty --penalty-coef 0.7 --penalty-target {target} --critic-warmup 1 --steps 4 --micro-batch-tokens 60"
    run = train(root, tmp_path / "run", flags)
    coefs = [0.7, 0.7, 0.7 * factor, 0.7 * factor**2]  # the rollout that trains the critic alone says nothing about the policy
    assert [row["penalty_coef"] for row in run.rows] == pytest.approx(coefs)
    assert all(call.penalty_coef == pytest.approx(coefs[call.rollout]) and call.kind == "penalty" for call in run.calls["policy_loss"])
    kls = minibatch_kls(run)  # of 4 minibatches in each of 3 rollouts
    assert [call.kl for call in run.calls["adapt_penalty"]] == pytest.approx([kls[3], kls[7], kls[11]], rel=1e-5)
    assert {call.target for call in run.calls["adapt_penalty"]} == {target}


def test_the_penalty_stays_without_a_target(root, tmp_path, default):
    run = train(root, tmp_path / "run", "--policy-loss penalty --penalty-coef 0.7")
    assert [row["penalty_coef"] for row in run.rows] == [0.7, 0.7] and "penalty_coef" not in default.rows[0]


@pytest.mark.case(17)
def test_a_kl_beyond_its_limit_is_warned_of(root, tmp_path, default):
    assert [call.kl_limit for call in default.calls["diagnose"]] == [20, 20] and "warning" not in default.said
    run = train(root, tmp_path / "run", "--kl-limit 1e-6 --steps 4")
    beyond = [row["step"] for row in run.rows if row["kl"] > 1e-6]
    assert beyond and max(row["kl"] for row in run.rows) < 20
    assert f"warning: step {beyond[0]:.0f}: the KL to the reference" in run.said and "--kl-limit" in run.said


def test_a_symptom_is_said_at_most_once_in_20_rollouts(root, tmp_path, monkeypatch):
    def diagnose(history, kl_limit, judges):
        return {"kl": "mind the KL"} | ({"gold": "mind the gold"} if len(history) in (4, 23) else {})

    monkeypatch.setattr(ppo, "diagnose", diagnose)
    run = train(root, tmp_path / "run", "--steps 24 --rollout-batch 2 --minibatches 1 --epochs 1 --max-new-tokens 2")
    said = [line for line in run.said.splitlines() if "mind the" in line]
    assert said == [f"warning: step {n}: mind the {what}" for n, what in ((1, "KL"), (4, "gold"), (21, "KL"))]
    for number, call in enumerate(run.calls["diagnose"], 1):  # it is shown the run so far
        assert [row["kl"] for row in call.history] == [row["kl"] for row in run.rows[:number]]


# -- neutral values, resuming, ranks

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
    assert same(steps_of(run, "critic")[-1].after, steps_of(plain, "critic")[-1].after)


@pytest.fixture(scope="module")
def stateful(root, tmp_path_factory):
    """A run that is not stopped, with everything that has a state."""
    run = train(root, tmp_path_factory.mktemp("stateful") / "run", STATEFUL)
    assert len({row["kl_coef"] for row in run.rows}) == 3 and len({row["penalty_coef"] for row in run.rows}) > 2
    return run


STATEFUL = ("--reward-norm standard --kl-target 0.05 --kl-horizon 40 --policy-loss penalty --penalty-target 0.001 --ema 0.8 --ptx-coef 0.5 "
            "--critic-warmup 1 --steps 4 " + PTX)


INTERRUPTED = {  # where a run is told to stop: a function, the rollout (from 0); each time two rollouts are kept
    "sampling": (rollout_file, "uniforms", 2), "scoring": (ppo, "forward", 2), "updating": (runtime.Run, "optimizer_step", 1)}


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


@pytest.mark.case(3)
@pytest.mark.parametrize("where", INTERRUPTED)
def test_resuming_with_everything_that_has_a_state_equals_never_stopping_bit_for_bit(where, stateful, root, tmp_path):
    whole = stateful
    interrupted(where, root, tmp_path / "parts", STATEFUL)
    assert state_of(tmp_path / "parts")["step"] == len(tools.metrics(tmp_path / "parts")) == 2
    parts = train(root, tmp_path / "parts", STATEFUL, "--resume")
    assert parts.rows == whole.rows and [call.rollout for call in parts.calls["gae"]] == [0, 1]
    for file in ("model.safetensors", "config.json", "ema/model.safetensors", "ema/config.json"):
        assert (parts.out / file).read_bytes() == (whole.out / file).read_bytes(), file
    assert tools.same(whole.out, parts.out)
    state, tensors = state_of(whole.out), load_file(tools.latest(whole.out) / "training.safetensors")
    assert {key.split("/")[0] for key in tensors} == {"policy", "critic", "ema", "policy_optimizer", "critic_optimizer"}
    assert state["extra"].keys() == {"kl_coef", "penalty_coef", "moments"} and state["extra"]["moments"][0] == 4 * 16
    assert [len(call.history) for call in parts.calls["diagnose"]] == [3, 4]  # it remembers the rollouts before the stop


def state_of(folder):
    """state.json of a run's newest checkpoint."""
    return json.loads((tools.latest(folder) / "state.json").read_text())


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
        (tmp_path / "other" / "model.safetensors").write_bytes((root / "reward" / "model.safetensors").read_bytes())
    else:
        demonstrations.write_text(json.dumps(json.loads(demonstrations.read_text())[1:]))
    with pytest.raises(UserError, match=f"since the run in .* began, what --{flag.replace('_', '-')} names has changed; "):
        train(root, tmp_path / "run", flags[0], "--steps 1 --resume", reward=flags[1])


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
    agreed(torch.tensor([self.step, self.state["kl_coef"], self.state["penalty_coef"], *self.state["moments"]], dtype=torch.float64))
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
for owner, function in ((runtime.Run, _save), (runtime.Run, backward), (ppo, whiten), (ppo, adapt_penalty), (ppo, missing_eos_scores)):
    plain[function.__name__] = getattr(owner, function.__name__)
    setattr(owner, function.__name__, function)
runtime.run_script(ppo.main, ppo.Config, "", sys.argv[1:])
"""


def test_two_ranks_agree_on_weights_averages_moments_and_when_to_stop(root, tmp_path):
    (tmp_path / "agreeing.py").write_text(AGREEING)
    (tmp_path / "mine.py").write_text("import os\n\ndef rank(prompts, replies):\n    return [float(os.environ['RANK'])] * len(replies)\n")
    flags = ("--reward {root}/reward --reward-fn mine:rank --reward-norm standard --kl-target 0.1 --policy-loss penalty --penalty-target 0.001 "
             "--ema 0.8 --ptx-coef 0.5 --ptx-data {root}/demonstrations.json --ptx-tokens 20 --kl-stop 0.002 --lr 0.02 --save-every 1")
    words = shlex.split(f"{RUN} {flags} --out {tmp_path}/run".format(root=root))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launcher, str(tmp_path / "agreeing.py"), *words],
                          capture_output=True, text=True, timeout=240, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(math.isfinite(value) for row in rows for value in row.values())
    assert min(row["updates"] for row in rows) < 4
    assert rows[1]["kl_coef"] == pytest.approx(adapt_kl_coef(0.1, rows[0]["kl"], target=0.1, replies=16, horizon=10000))  # of both ranks
    with torch.no_grad():
        logprobs = ptx_logprobs(root, network(GPT, root / "sft"), 0, budget=20)
    assert float(re.search("first loss (.*)", done.stdout)[1]) == pytest.approx(-0.5 * logprobs.mean().item(), rel=1e-4)
    assert {row["score_mine:rank"] for row in rows} == {0.5}  # the mean over the ranks, each of which scored with its own number
    assert state_of(tmp_path / "run")["extra"]["moments"][0] == 2 * 16


def rank_of(number, monkeypatch, rank, root, out, flags):
    """What one of several ranks does with its part of the data, the others being silent: nothing is added to its sums."""
    with monkeypatch.context() as patch:
        patch.setenv("RANK", str(rank)), patch.setenv("WORLD_SIZE", str(number))
        for name, stand_in in {"join": lambda *args: None, "_from_main": lambda self, read: read(), "_arrive": lambda *args: None, "_all": lambda self, tensor, how: tensor,
                               "any_rank": lambda self, flag: flag, "parallel": lambda self, module: module}.items():
            patch.setattr(runtime.Run, name, stand_in)
        return train(root, out, flags)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_prompts_replies_and_minibatches_as_one_process_has_them(ranks, root, tmp_path, monkeypatch):
    """Every reply is once in an epoch, every rank has as many in a minibatch, and which are together hangs on no rank."""
    rows = json.loads((root / "prompts.json").read_text()) + [{"prompt": f"Say {word} and {word}."} for word in WORDS]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))  # 16 of them: none comes twice in a rollout
    flags = f"--data {tmp_path}/prompts.json --epochs 3 --minibatches 4 --lr 1e-9 --critic-lr 1e-9"  # all play the same policy, nearly
    one, parts = train(root, tmp_path / "one", flags), [rank_of(ranks, monkeypatch, rank, root, tmp_path / str(rank), flags) for rank in range(ranks)]
    for rollout in (0, 1):
        dealt = [[tuple(prompt) for prompt in run.calls["generate"][rollout].prompts] for run in (one, *parts)]
        assert [len(prompts) for prompts in dealt] == [16] + [16 // ranks] * ranks
        assert dealt[0] == sorted(dealt[0], key=len) == [prompt for together in zip(*dealt[1:]) for prompt in together]  # by length, one after the other
        replies = [{tuple(ids[~mask][:len(prompt)].tolist()): ids[mask].tolist() for ids, mask, prompt in zip(generated.ids, generated.mask, prompts)}
                   for generated, prompts in zip((rollout_of(run, rollout) for run in (one, *parts)), dealt)]
        assert replies[0] == {prompt: reply for part in replies[1:] for prompt, reply in part.items()} and len(replies[0]) == 16
        batches = [[step.batch for step in steps_of(run, "critic") if step.rollout == rollout] for run in (one, *parts)]
        assert [[len(batch) for batch in run] for run in batches] == [[4] * 12] + [[4 // ranks] * 12] * ranks
        for number, whole in enumerate(batches[0]):
            assert set(whole) == {prompt for part in batches[1:] for prompt in part[number]}
        epochs = [batches[0][4 * epoch:][:4] for epoch in range(3)]
        assert all(len({prompt for batch in epoch for prompt in batch}) == 16 for epoch in epochs)  # each reply once
        assert len({frozenset(map(frozenset, epoch)) for epoch in epochs}) == 3  # mixed anew


@pytest.mark.case(33)
@pytest.mark.parametrize("rows", [0, 5])
def test_a_run_that_decodes_without_a_cache_takes_the_very_steps_of_one_that_has_a_cache(rows, root, tmp_path, monkeypatch):
    flags = f"--steps 3 --temperature 0.8 --rollout-rows {rows}"
    cached = train(root, tmp_path / "cached", flags)

    def generate(policy, prompts, max_new_tokens, tokenizer, temperature, rows, uniform, interrupted):
        replies = []
        for prompt, numbers in zip(prompts, uniform):
            ids = list(prompt)
            while len(ids) == len(prompt) or (ids[-1] not in tokenizer.stops and len(ids) < len(prompt) + max_new_tokens):
                with torch.no_grad():
                    logits = policy.logits(policy.transformer(torch.tensor([ids])))[:, -1]
                ids.append(sample_token(logits, temperature, 0, 1.0, numbers[None, len(ids) - len(prompt)]).item())
            replies.append(ids)
        ids, lengths = pad_rows(replies, tokenizer.pad)
        mask = pad_rows([[False] * len(prompt) + [True] * (len(reply) - len(prompt)) for prompt, reply in zip(prompts, replies)], False)[0]
        return Generation(ids, mask, lengths, torch.tensor([reply[-1] in tokenizer.stops for reply in replies]))

    monkeypatch.setattr(rollout_file, "generate", generate)
    plain = train(root, tmp_path / "plain", flags)
    assert len(cached.calls["generate"]) == 3 and 0 < sum(rollout_of(cached, i).ended.sum() for i in range(3)) < 3 * 16
    for number in range(3):
        assert all(torch.equal(a, b) for a, b in zip(rollout_of(cached, number), rollout_of(plain, number)))
    assert plain.rows == cached.rows and tools.same(plain.out, cached.out)


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
    ("--reward-fn mistaken:short --reward-weights 1", "reward, mistaken:short)"),  # in the order of the weights
    ("--reward-weights heavy", "invalid float value: 'heavy'"),
    ("--reward {root}/reward {root}/sft", "holds a language model, but a reward model is needed"),
    ("--reward {root}/reward {root}/other --out {root}/other --overwrite", "--overwrite would delete the --reward"),
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
def test_a_mistake_ends_in_one_line_before_anything_is_written(flags, said, root, tmp_path, monkeypatch, capsys):
    (tmp_path / "mistaken.py").write_text(MISTAKEN)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    reward = "" if "--reward " in flags else "--reward {root}/reward"
    out = "" if "--out" in flags else f"--out {tmp_path}/out"
    words = shlex.split(f"{RUN} {reward} {flags} {out}".format(root=root))
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    try:
        with pytest.raises(SystemExit) as stopped:
            runtime.run_script(ppo.main, ppo.Config, "", words)
    finally:
        sys.modules.pop("mistaken", None)  # the next one finds its own
    errors = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: ") and said in errors[0]
    assert not (tmp_path / "out").exists() and before == {p: p.stat().st_mtime_ns for p in root.rglob("*")}


@pytest.mark.case(12)
@pytest.mark.parametrize("block_size, pattern, said", [
    (64, r"\S+|\s+", "--reward {}/odd has another tokenizer than --model {}/sft"), (12, None, "every row is longer than the 2 tokens that the context leaves for it"),
    (10, None, "--max-new-tokens 10 leaves no room for a prompt in the context of 10")])
def test_a_reward_model_that_reads_other_tokens_or_fewer_of_them_is_refused(block_size, pattern, said, root, tmp_path):
    tokenizer = load_model(root / "reward", ScalarModel)[1]
    other = Tokenizer("odd", pattern or tokenizer.pattern, tokenizer.ranks)
    save_model(tmp_path / "odd", ScalarModel(GPTConfig(other.n_vocab, block_size, 1, 2, 2, 32)), other)
    with pytest.raises(UserError, match=said.format(tmp_path, root)):
        train(root, tmp_path / "run", reward=f"--reward {{root}}/reward {tmp_path}/odd")
    assert not (tmp_path / "run").exists()


def test_a_critic_from_the_reward_model_needs_one(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(zero=lambda prompts, replies: [0.0] * len(replies)))
    with pytest.raises(UserError, match="--critic-init reward needs a --reward folder"):
        train(root, tmp_path / "run", "--critic-init reward", reward="--reward-fn mine:zero")
    assert not (tmp_path / "run").exists()


# -- runs that stop, start over and go wrong

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


def test_the_reward_model_of_the_default_is_guarded_like_one_that_is_named(root, tmp_path, monkeypatch):
    (tmp_path / "runs" / "reward").mkdir(parents=True)
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "runs" / "reward" / file).write_bytes((root / "reward" / file).read_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="would delete the --reward"):
        train(root, Path("runs/reward"), "--overwrite", reward="")
    train(root, tmp_path / "run", "--steps 1", reward="")
    (tmp_path / "runs" / "reward" / "model.safetensors").write_bytes((root / "other" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="since the run in .* began, what --reward names has changed; "):
        train(root, tmp_path / "run", "--steps 1 --resume", reward="")


def test_a_reward_function_may_return_what_a_network_computed(root, tmp_path, monkeypatch):
    weight = torch.ones((), requires_grad=True)
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(learned=lambda prompts, replies: weight * torch.tensor([float(len(r)) for r in replies])))
    train(root, tmp_path / "run", reward="--reward-fn mine:learned")
    assert weight.grad is None


def test_reward_weights_must_be_finite(root, tmp_path):
    for number in ("nan", "inf"):
        with pytest.raises((UserError, SystemExit)):
            train(root, tmp_path / "run", f"--reward-weights {number}")
        assert not (tmp_path / "run").exists()


@pytest.mark.case(31)
def test_scores_that_are_all_equal_are_not_blown_up():
    scores = torch.ones(4)
    assert normalise_scores(scores, update_moments([0, 0.0, 0.0], scores), "scale", 0.0).tolist() == pytest.approx([1.0] * 4)
    assert normalise_scores(scores, update_moments([0, 0.0, 0.0], scores), "standard", 0.0).tolist() == [0.0] * 4


@pytest.mark.case(31)
@pytest.mark.parametrize("value", [0.1, -0.3, 1e-7, 1234.567, 3e6])
@pytest.mark.parametrize("n", [1, 3, 96, 256, 1000])
def test_equal_scores_whose_mean_is_inexact_in_fp32_are_not_blown_up_either(value, n):
    """96 scores of 0.1 became 5,717,654: their fp32 mean is 0.1 and a little."""
    scores, moments = torch.full((n,), value), [0, 0.0, 0.0]
    for _ in range(3):
        moments = update_moments(moments, scores)
        assert normalise_scores(scores, moments, "scale", 0.0).tolist() == pytest.approx(scores.tolist())
        assert normalise_scores(scores, moments, "standard", 0.0).abs().max() <= 1e-6 * abs(value)
    spread = scores.clone()
    spread[0] += 1e-3 * value  # a deviation that is one
    if n > 1:
        moments = update_moments([0, 0.0, 0.0], spread)
        assert normalise_scores(spread, moments, "scale", 0.0).abs().max() > 100 * min(1, abs(value))


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.5])
def test_nothing_is_explained_of_returns_that_do_not_vary(value):
    returns = torch.where(MASK, value, 0.0)
    for values in (returns, torch.randn(4, 9) * MASK):
        assert explained_variance(values, returns, MASK).item() == 0
    returns = torch.randn(4, 9) * MASK
    half = returns[MASK].mean() + 0.5 * (returns - returns[MASK].mean())
    assert explained_variance(half, returns, MASK).item() == pytest.approx(0.75, abs=1e-5)
    assert explained_variance(returns, returns, MASK).item() == pytest.approx(1)


def test_critic_warmup_leaves_beta_alone_and_the_policys_schedule_for_later(root, tmp_path):
    rows = train(root, tmp_path / "run", "--critic-warmup 2 --steps 4 --warmup 2 --lr 0.01 --kl-target 6 --kl-horizon 16").rows
    assert [row["kl_coef"] for row in rows[:3]] == [rows[0]["kl_coef"]] * 3
    assert [row["lr"] for row in rows] == pytest.approx([0, 0, 0.005, 0.01])


@pytest.mark.parametrize("flag", ["--kl-stop 0.1", "--policy-loss penalty --penalty-target 0.1"])
def test_what_looks_at_how_far_an_update_has_gone_needs_more_than_one_step(flag, root, tmp_path):
    with pytest.raises(UserError, match="need more than one of --epochs or --minibatches"):
        train(root, tmp_path / "run", f"{flag} --epochs 1 --minibatches 1")


# -- which prompts

def test_ppo_takes_its_part_of_the_prompts_and_evaluation_those_that_no_stage_has_seen(root, tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"prompt": f"Say {word} {i}."} for word in WORDS for i in range(8)]))
    kept, held_out = split_by_prompt(read_rows(path, "prompts", str, "1/1:2"), 0.4)
    assert 5 < len(held_out) < len(kept) < 30
    flags = f"--data {path} --part 1/1:2 --val-fraction 0.4 --max-new-tokens 4 --threads 1"
    run = train(root, tmp_path / "run", flags, "--steps 1 --rollout-batch 64")
    assert f"{len(kept)} prompts, for instance" in run.said
    tokenizer = load_model(root / "sft", GPT)[1]
    assert {tuple(ids) for ids in run.calls["generate"][0].prompts} == {tuple(encode_prompt(tokenizer, row.prompt)) for row in kept}
    with quietly():
        main(evaluate, shlex.split(f"{flags} --models {root}/sft --reward {root}/reward --out {tmp_path}/evaluation.json"))
    replies, = json.loads((tmp_path / "evaluation.json").read_text())["replies"].values()
    assert [reply["prompt"] for reply in replies] == [row.text for row in held_out]
