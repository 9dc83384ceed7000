"""kto.py, run as it is, reaches what minimises its expected loss on a task that can be listed.

Of a reply with g good and b bad labels the loss is a constant less pull * sigma(beta (r - z)), where
pull = good_weight g - bad_weight b. With z held fixed its least value, over policies that add up to one, has

    pi(y|x) = 0                                       where pull <= 0
    pi(y|x) ~ pull(y) sigma'(beta (r(y|x) - z))       elsewhere, r = log pi / ref

For beta <= 1 the rest is concave in pi, so that there is one such policy for each z. It is not the optimum of
PPO and DPO: the reference counts in sigma' alone, and a reply counts as often as the data have it.
"""
import contextlib
import io
import shlex
from typing import NamedTuple
from unittest import mock

import pytest
import torch

import kto
from bench.optimum import (
    PROMPTS, entry, log_probabilities, optimum, texts_of, write_lines, write_reference)
from plumbing.flags import parse_flags

NEAR = 0.02  # total variation
BETA = 0.9
STEPS = "--lr 1e-2 --steps 100"  # enough for replies of one symbol without a bug


class Task(NamedTuple):
    """Tables (prompts, replies) of labelled replies to both prompts."""
    ref: torch.Tensor  # ref(y|x)
    good: torch.Tensor  # how many labels are good
    bad: torch.Tensor
    best: torch.Tensor  # pi* of PPO and DPO for the same beta


def write_task(folder, length, evenly, times):
    """Write a reference and labelled replies of 1 to length symbols, `times` for each text and prompt.

    They are drawn evenly, or else as the reference draws them. A reply is good with probability sigma(r).
    All counts are the expected ones, rounded.
    """
    model, tokenizer = write_reference(folder / "reference", length)
    replies = texts_of(tokenizer, length)
    texts = [tokenizer.decode(y) for y in replies]
    ref = log_probabilities(model, tokenizer, replies).exp()
    rewards = torch.tensor([[entry(prompt, text) for text in texts] for prompt in PROMPTS], dtype=ref.dtype)
    drawn = torch.full_like(ref, times)
    if not evenly:
        drawn = (times * len(texts) * ref / ref.sum(1, keepdim=True)).round().clamp(min=1)
    good = (drawn * rewards.sigmoid()).round()
    bad = drawn - good
    rows = []
    for table, label in ((good, True), (bad, False)):
        for prompt, counts in zip(PROMPTS, table.int().tolist()):
            for text, count in zip(texts, counts):
                rows += [{"prompt": prompt, "completion": text, "label": label}] * count
    write_lines(folder / "data.jsonl", rows)
    return Task(ref, good, bad, optimum(model, tokenizer, replies, BETA))


def point(policy, task):
    """z () of a policy (prompts, replies): each of the two prompts meets the other's replies."""
    drawn = (task.good + task.bad).flip(0)
    ratios = (policy / task.ref).log()
    return ((drawn * ratios).sum() / drawn.sum()).clamp(min=0)


def kto_optimum(task, good_weight):
    """The policy (prompts, replies) that minimises the expected loss for the z that it has itself.

    It is found by going half the way, in logarithms, to what the formula above makes of a policy.
    """
    pull = (good_weight * task.good - task.bad).clamp(min=0)
    policy = pull / pull.sum(1, keepdim=True)
    for _ in range(1000):
        s = torch.sigmoid(BETA * ((policy / task.ref).log() - point(policy, task)))
        target = pull * s * (1 - s)
        policy = (policy * target / target.sum(1, keepdim=True)).sqrt()
        policy = policy / policy.sum(1, keepdim=True)
    return policy


def variation(policy, other):
    """Total variation, averaged over the prompts; what is missing to 1 is on replies that the table lacks."""
    missing = (policy.sum(1) - other.sum(1)).abs()
    return (((policy - other).abs().sum(1) + missing) / 2).mean().item()


def end(folder, *, length=1, evenly, good_weight, times=10, flags=STEPS):
    """(distance to KTO's optimum at the end of a run, that optimum, `Task`)."""
    task = write_task(folder, length, evenly, times)
    best = kto_optimum(task, good_weight)
    words = (f"--model {folder}/reference --data {folder}/data.jsonl --out {folder}/run --threads 1 "
             f"--val-fraction 0 --batch-tokens 100000 --micro-batch-tokens 100000 --warmup 5 --beta {BETA} "
             f"--good-weight {good_weight} --log-every 1000 --save-every 1000 {flags}")
    found = []

    def measure(out, policy, tokenizer, config):
        policy = log_probabilities(policy, tokenizer, texts_of(tokenizer, length)).exp()
        found.append(variation(policy, best))

    with mock.patch.object(kto, "save_model", measure), contextlib.redirect_stdout(io.StringIO()):
        kto.main(parse_flags(kto.Config, "", shlex.split(words)))
    return found[-1], best, task


@pytest.mark.parametrize("evenly, good_weight", [(False, 1), (True, 1), (True, 3)])
def test_no_policy_has_a_lower_expected_loss_than_that_of_the_formula(evenly, good_weight, tmp_path):
    """Equation 8 in plain words, at the z of the optimum: against policies near it and far from it."""
    task = write_task(tmp_path, 2, evenly, 10)
    best = kto_optimum(task, good_weight)
    z = point(best, task)

    def expected_loss(policy):
        ratios = (policy / task.ref).log()
        good = good_weight * (1 - torch.sigmoid(BETA * (ratios - z)))
        bad = 1 - torch.sigmoid(BETA * (z - ratios))
        return (task.good * good + task.bad * bad).sum(1)  # (prompts,)

    torch.manual_seed(0)
    least = expected_loss(best)
    even = torch.ones(2, best.shape[1], dtype=best.dtype)
    for scale in (0.1, 1.0, 10.0):
        for _ in range(200):
            other = torch.distributions.Dirichlet(scale * even).sample()
            for share in (1e-3, 1e-2, 0.1, 1.0):
                assert (expected_loss((1 - share) * best + share * other) >= least - 1e-12).all()


@pytest.mark.parametrize("evenly, good_weight", [(False, 1), (True, 3)])
def test_kto_reaches_its_own_optimum_which_is_not_that_of_dpo(evenly, good_weight, tmp_path):
    """With weight 1 what is more often bad than good gets nothing, and z is 0; with 3 all get some."""
    far, best, task = end(tmp_path, evenly=evenly, good_weight=good_weight)
    assert far < NEAR
    if good_weight == 1:
        assert (best == 0).any() and point(best, task) == 0
    else:
        assert (best > 0.05).all() and point(best, task) > 3
    assert variation(best, task.best) > 0.06


# -- bugs, planted: none may reach the optimum with what suffices without it

def no_kl_point(patch):
    patch.setattr(kto, "kl_point", lambda log_ratios: torch.zeros(()))


def kl_point_of_the_wrong_sign(patch):
    right = kto.kl_point
    patch.setattr(kto, "kl_point", lambda log_ratios: -right(log_ratios))


def reference_left_out(patch):
    """Both sums are then of the policy alone: ref(y|x) is 1 for all."""
    right = kto.reply_logprobs

    def reply_logprobs(run, model, *rest):
        found = right(run, model, *rest)
        return found if model is run.modules["policy"] else 0 * found

    patch.setattr(kto, "reply_logprobs", reply_logprobs)


def weights_swapped(patch):
    right = kto.kto_loss

    def kto_loss(log_ratios, good, z, weight, config):
        return right(log_ratios, good, z, weight * torch.where(good, 1 / 3, 3.0), config)

    patch.setattr(kto, "kto_loss", kto_loss)


def logarithm_as_in_dpo(patch):
    def kto_loss(log_ratios, good, z, weight, config):
        sign = torch.where(good, 1.0, -1.0)
        value = torch.where(good, config.good_weight, config.bad_weight)
        gain = config.beta * sign * (log_ratios - z)
        return -(weight * value * torch.nn.functional.logsigmoid(gain)).sum()

    patch.setattr(kto, "kto_loss", kto_loss)


@pytest.mark.parametrize("bug", [
    pytest.param(no_kl_point, id="no_kl_point"),
    *(pytest.param(bug, id=bug.__name__, marks=pytest.mark.long) for bug in (
        kl_point_of_the_wrong_sign, reference_left_out, weights_swapped, logarithm_as_in_dpo)),
])
def test_kto_with_a_bug_does_not_reach_its_optimum(bug, monkeypatch, tmp_path):
    bug(monkeypatch)
    assert end(tmp_path, evenly=True, good_weight=3)[0] > 2 * NEAR
